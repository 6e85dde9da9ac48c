//! What a new daemon finds of the one before: machines that run, and what belongs to no pod.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_sandbox::error::{Error, Result, blocking};
use containerd_sandbox::sandboxer::{Recovered, SandboxContext, SandboxExit};
use kuasar_pod::files;
use tokio::sync::watch;

use super::{VmmSandboxer, state};
use crate::block;
use crate::channel;
use crate::errors::chain;
use crate::guest::{Guest, Limits};
use crate::runtime::{Containers, Pod};

impl VmmSandboxer {
    /// The machine of a pod that an earlier daemon has recorded, if it still runs.
    pub(super) async fn take_up(&self, ctx: &SandboxContext) -> Result<Recovered> {
        let config = self.config();
        let state = state(ctx);
        let id = &ctx.spec.id;
        if let Some(user) = state.user {
            self.users.reserve(id, user);
        }
        let lost = |why: &str| {
            tracing::warn!(sandbox = id, why, "the pod is down");
            Recovered::Stopped(SandboxExit { status: 255, at: SystemTime::now() })
        };
        let dir = state.machine_dir.clone().unwrap_or_default();
        let (end, gone) = watch::channel(false);
        let dial = channel::dial(state.vm.as_ref().map(|vm| &vm.channel), &dir);
        let taken = match state.vm.clone() {
            None => Err("it has no machine".to_owned()),
            Some(_) if self.fresh => Err("sandbox-parent has been lost".to_owned()),
            Some(recorded) => {
                let (driver, _) = self.vmm(&config, recorded.kind, state.user)?;
                let newest = block::newest(&ctx.dir, recorded);
                driver.reattach(newest).await.map_err(|error| chain(&error))
            }
        };
        let vm = match taken {
            Ok(vm) => vm,
            Err(why) => {
                self.end_machine(ctx, &state, Duration::ZERO).await?;
                // containerd asks how its containers have ended, and deletes them.
                end.send_replace(true);
                let limits = Limits { connect: Duration::ZERO, call: Duration::ZERO };
                let guest = Arc::new(Guest::new(dial, state.token, limits, gone));
                let times = config.guest_timeouts;
                let pod = Pod {
                    id: id.clone(),
                    dir: ctx.dir.clone(),
                    pid: 0,
                    drain: times.drain,
                    create: times.create,
                    kill: times.kill,
                };
                let files = (config.storage.clone(), state.share.sharing(&config));
                let containers = Containers::new(pod, guest, self.keeper(id), None, files);
                self.servers.make(ctx, Arc::new(containers))?.server().recover().await;
                return Ok(lost(&why));
            }
        };
        // One that has ended meanwhile says so at once.
        let ended = tokio::time::timeout(Duration::from_millis(1), vm.wait()).await;
        let ended = ended.ok().and_then(std::result::Result::ok);
        if ended.is_some() {
            end.send_replace(true);
        }
        let pid = vm.pid();
        let config = (&*config, state.share);
        let (tasks, _) = self.insert(ctx, config, vm, state.token, dial, (end, gone))?;
        tasks.server().recover().await;
        if state.task_port != 0
            && let Some(announced) = self.prepare_announced(id)
        {
            // What cannot be read was never taken.
            let list = kuasar_daemon::tasks::announced(ctx).unwrap_or_default();
            announced.recover(&list).await;
        }
        Ok(match ended {
            Some(exit) => Recovered::Stopped(SandboxExit { status: exit.status, at: exit.at }),
            None => {
                self.follow_network(ctx, None);
                Recovered::Running(self.started(ctx, pid))
            }
        })
    }

    /// Removes what belongs to no pod that is known.
    pub(super) async fn remove_lost(&self, known: &[String]) -> Result<()> {
        for id in known {
            // Containers that the guest's engine has are not the Task server's.
            if let Some(tasks) = self.servers.get(id).filter(|_| self.announced(id).is_none()) {
                tasks.server().sweep().await;
            }
        }
        let names = self
            .parent
            .kept()
            .await
            .map_err(|error| Error::internal("ask sandbox-parent what it keeps", error))?;
        // Machines that came out of the pool have names of their own.
        let named: BTreeSet<String> =
            self.live().values().map(|live| live.vm.state().id.clone()).collect();
        let mut strangers: Vec<&str> = names
            .iter()
            .filter_map(|name| name.split_once('/').map(|(id, _)| id))
            .filter(|id| *id != kuasar_daemon::sockets::OWN_GROUP)
            .filter(|id| known.iter().all(|known| known != id) && !named.contains(*id))
            .collect();
        strangers.dedup();
        for id in strangers {
            tracing::info!(sandbox = id, "removing what a lost pod has left");
            let _ = self.parent.forget(&format!("{id}/")).await;
        }
        let (dir, known) = (self.dir.clone(), known.to_vec());
        self.sweep_templates()?;
        self.pool.sweep().await?;
        blocking(move || files::unmount_lost(&dir, &known)).await?;
        self.pool.begin();
        Ok(())
    }
}
