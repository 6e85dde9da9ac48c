//! runc-sandboxer
fn main() {}
