//! sandbox-parent
