//! kuasar-host
