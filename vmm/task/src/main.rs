//! `vmm-task`: PID 1 of a microVM pod's guest, and the programs that it runs itself as.

use std::process::ExitCode;

fn main() -> ExitCode {
    // The engine first: it is on the hot path and wants nothing of what PID 1 sets up.
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("oci") => kuasar_oci::builtin::main("vmm-task oci", arguments.collect()).into(),
        Some(vmm_task::containers::EXECS) => {
            kuasar_oci::builtin::serve::main("vmm-task execs", arguments).into()
        }
        Some(vmm_task::debug::WORD) if std::process::id() != 1 => vmm_task::debug::main(arguments),
        Some("pod-init") => vmm_task::init::main(),
        // The kernel passes words of its command line on that it does not know.
        _ if std::process::id() == 1 => vmm_task::agent::main(),
        _ => {
            eprintln!("vmm-task is the init process of a guest: it runs as PID 1, or as `oci`");
            ExitCode::FAILURE
        }
    }
}
