//! `vmm-jailer jail …`: the jailer as a program of its own, for the tests.

fn main() -> std::process::ExitCode {
    std::process::ExitCode::from(vmm_sandboxer::jail::main(std::env::args_os().skip(2)))
}
