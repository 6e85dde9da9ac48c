//! The built-in engine as a program of its own; the tests of the runtime run it.

fn main() -> std::process::ExitCode {
    kuasar_oci::builtin::main("kuasar-oci", std::env::args().skip(1).collect()).into()
}
