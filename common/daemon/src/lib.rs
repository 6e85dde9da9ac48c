//! kuasar-daemon
