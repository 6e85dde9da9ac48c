//! containerd-shim-kuasar
fn main() {}
