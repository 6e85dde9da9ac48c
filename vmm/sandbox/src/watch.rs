//! What watches a running machine: its end, its helpers, its guest's events and health.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_sandbox::sandboxer::SandboxExit;
use tokio::sync::watch;
use vmm_common::guest as wire;

use crate::boot::panic_words;
use crate::guest::{Guest, GuestError, service};
use crate::runtime::Containers;
use crate::vmm::{self, Vm};

/// How long the guest may hold back an answer that there are no events.
const POLL: Duration = Duration::from_secs(20);
/// Between two attempts to ask for events.
const AGAIN: Duration = Duration::from_millis(500);
/// A helper that ends in good order may have seen the machine's end before us: how long that is waited for.
const WITH_IT: Duration = Duration::from_secs(2);
/// For how long the end of a machine may be on its way to us when what depends on it is gone already.
const ON_ITS_WAY: Duration = Duration::from_millis(50);

/// Tells the end of a machine: first its containers, then the Controller. Then, to people, whether its
/// kernel had panicked, by its console.
pub(crate) async fn watch_end(
    id: String,
    vm: Arc<dyn Vm>,
    gone: watch::Sender<bool>,
    handle: containerd_sandbox::SandboxHandle,
    console: PathBuf,
) {
    let exit = match vm.wait().await {
        Ok(exit) => SandboxExit { status: exit.status, at: exit.at },
        // sandbox-parent is lost: the daemon ends, too, and nothing may be answered.
        Err(_) => return,
    };
    gone.send_replace(true);
    handle.exited(exit);
    // Its helpers are of no use any more.
    if let Err(error) = vm.stop(Duration::ZERO).await {
        tracing::error!(sandbox = id, %error, "helpers of an ended machine are left");
    }
    if let Some(said) = panic_words(&console) {
        tracing::error!(sandbox = id, console = said, "the guest's kernel panicked");
    }
}

/// Whether a machine has ended, or does within `patience`.
async fn is_over(vm: &dyn Vm, patience: Duration) -> bool {
    tokio::time::timeout(patience, vm.wait()).await.is_ok()
}

/// Whether a machine has ended, of which something is gone that ends with it.
pub(crate) async fn is_ending(vm: &dyn Vm) -> bool {
    is_over(vm, ON_ITS_WAY).await
}

/// A machine without one of its helpers is no machine any more: it is ended.
pub(crate) async fn watch_helpers(id: String, vm: Arc<dyn Vm>) {
    use tokio::sync::broadcast::error::RecvError;
    let mut events = vm.events();
    loop {
        match events.recv().await {
            Ok(vmm::Event::HelperEnded { name, status }) => {
                // virtiofsd ends when the VMM hangs up, which some do well before they end; and after
                // a machine's end we kill what is left.
                let patience = if status == 0 { WITH_IT } else { ON_ITS_WAY };
                if is_over(&*vm, patience).await {
                    tracing::debug!(sandbox = id, helper = name, "it has ended with its machine");
                    continue;
                }
                tracing::error!(
                    sandbox = id,
                    helper = name,
                    status,
                    "it has ended: so does the pod"
                );
                if let Err(error) = vm.stop(Duration::ZERO).await {
                    tracing::error!(sandbox = id, %error, "the machine cannot be ended");
                }
                return;
            }
            Ok(vmm::Event::Panicked) => {
                tracing::error!(sandbox = id, "the guest's kernel panicked")
            }
            Ok(event) => tracing::debug!(sandbox = id, ?event, "machine"),
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

/// Hears the guest's events.
pub(crate) async fn watch_events(guest: Arc<Guest>, containers: Arc<Containers>) {
    let mut after = 0;
    loop {
        let question = wire::NextEventsRequest {
            after,
            timeout_ms: u64::try_from(POLL.as_millis()).unwrap_or_default(),
            ..wire::NextEventsRequest::default()
        };
        let limit = Some(POLL + guest.limits().call);
        let answer: std::result::Result<wire::NextEventsResponse, _> =
            guest.call_for(service::GUEST, "NextEvents", &question, limit).await;
        match answer {
            Ok(answer) => {
                let none = answer.events.is_empty();
                for event in answer.events {
                    after = after.max(event.sequence);
                    match event.event {
                        Some(wire::event::Event::Oom(oom)) => {
                            containers.out_of_memory(&oom.container);
                        }
                        Some(wire::event::Event::Warning(text)) => {
                            tracing::warn!(text = crate::guest::clean(&text.text), "a guest says");
                        }
                        _ => {}
                    }
                }
                if none {
                    // A guest that answers at once all the time is not asked all the time.
                    tokio::time::sleep(AGAIN).await;
                }
            }
            Err(GuestError::Gone) => return,
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    }
}

/// Sets the guest's clock now and then, which shows as well whether it is alive.
pub(crate) async fn watch_health(
    id: String,
    vm: Arc<dyn Vm>,
    guest: Arc<Guest>,
    every: Duration,
    unwell: u32,
) {
    let mut failed = 0_u32;
    loop {
        tokio::time::sleep(every).await;
        let question = wire::SetClockRequest {
            now_ns: crate::guest::now_ns(),
            tolerance_ns: 100_000_000,
            ..wire::SetClockRequest::default()
        };
        let answer: std::result::Result<wire::SetClockResponse, _> =
            guest.call_again(service::GUEST, "SetClock", &question).await;
        match answer {
            Ok(_) => failed = 0,
            Err(GuestError::Gone) => return,
            Err(error) => {
                failed = failed.saturating_add(1);
                tracing::warn!(sandbox = id, failed, %error, "the guest is unwell");
            }
        }
        if unwell > 0 && failed >= unwell {
            tracing::error!(sandbox = id, failed, "its machine is killed");
            let _ = vm.stop(Duration::ZERO).await;
            return;
        }
    }
}
