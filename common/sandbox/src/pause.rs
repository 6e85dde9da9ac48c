//! A pod of an engine that knows no sandboxes: CRI's own way, which containerd 1.7 has by default
//! (engine-contract §8.1). It wants to run a *pause container*, by Task calls for the sandbox' id on
//! the pod's socket. Its Create is the pod's Create and Start, its Kill is Stop, its Delete is Shutdown.
//! Nothing of the pause image is mounted or run: the pod is a sandbox of ours like any other.
//!
//! What such a Create says of the pod is the OCI spec in the bundle, from which the pod's CRI
//! configuration is made again as far as it can be. Whether containers share a PID namespace is not in
//! it, so every pod has one, with its init, and a container joins when its spec says so.

use std::io::Read;
use std::path::Path;

use kuasar_protos::controller as api;
use kuasar_protos::cri::{LinuxContainerResources, NamespaceMode, PodSandboxConfig};
use kuasar_protos::shim::api as task;
use protobuf::{EnumOrUnknown, Message};
use serde_json::Value;
use ttrpc::proto::Request;

use crate::controller::{Call, Controller};
use crate::error::{Error, Result};
use crate::store::{Phase, Record};
use crate::wire::{any, timestamp};

/// Largest spec that is read.
const MOST: u64 = 16 << 20;
/// Beginning of CRI's own annotations.
const CRI: &str = "io.kubernetes.cri.";

/// Whether this Task call is about the sandbox itself. In all of them the id is the first field.
pub(crate) fn concerns(request: &Request, id: &str) -> bool {
    task::ConnectRequest::parse_from_bytes(&request.payload).is_ok_and(|q| q.id == id)
}

fn parse<T: Message>(request: &Request) -> Result<T> {
    T::parse_from_bytes(&request.payload)
        .map_err(|e| Error::InvalidArgument(format!("{}: {e}", request.method)))
}

fn bytes(answer: &impl Message) -> Result<Vec<u8>> {
    answer.write_to_bytes().map_err(|e| Error::internal("an answer", e))
}

/// Answers a Task call for the sandbox' id.
///
/// # Errors
/// The Controller's; Unimplemented for what a pause container has no use for.
pub(crate) async fn answer(
    c: &Controller,
    call: &Call,
    id: &str,
    request: &Request,
) -> Result<Vec<u8>> {
    match request.method.as_str() {
        "Create" => {
            let q: task::CreateTaskRequest = parse(request)?;
            create(c, call, &q).await?;
            bytes(&task::CreateTaskResponse { pid: c.pid(id), ..Default::default() })
        }
        "Start" if parse::<task::StartRequest>(request)?.exec_id.is_empty() => {
            c.core.find(id)?;
            bytes(&task::StartResponse { pid: c.pid(id), ..Default::default() })
        }
        "State" => {
            let record = c.core.find(id)?.record();
            let mut answer = task::StateResponse {
                id: id.into(),
                bundle: record.bundle.as_ref().map(|b| b.display().to_string()).unwrap_or_default(),
                pid: c.pid(id),
                status: EnumOrUnknown::new(match record.phase {
                    Phase::Creating | Phase::Created | Phase::Starting => task::Status::CREATED,
                    Phase::Ready | Phase::Stopping => task::Status::RUNNING,
                    Phase::Stopped | Phase::Removing => task::Status::STOPPED,
                }),
                ..Default::default()
            };
            if let Some(exit) = &record.exit {
                (answer.exit_status, answer.exited_at) = (exit.status, timestamp(exit.at));
            }
            bytes(&answer)
        }
        "Wait" if parse::<task::WaitRequest>(request)?.exec_id.is_empty() => {
            let q = api::ControllerWaitRequest { sandbox_id: id.into(), ..Default::default() };
            let a = c.wait(call, q).await?;
            let (exit_status, exited_at) = (a.exit_status, a.exited_at);
            bytes(&task::WaitResponse { exit_status, exited_at, ..Default::default() })
        }
        "Kill" if parse::<task::KillRequest>(request)?.exec_id.is_empty() => {
            let phase = c.core.find(id)?.record().phase;
            if matches!(phase, Phase::Stopped | Phase::Removing) {
                return Err(Error::NotFound(format!("sandbox {id} has ended already")));
            }
            // Signal 0 asks whether it lives; any other ends a pause container.
            if parse::<task::KillRequest>(request)?.signal != 0 {
                let q = api::ControllerStopRequest { sandbox_id: id.into(), ..Default::default() };
                c.stop(call, q).await?;
            }
            Ok(Vec::new())
        }
        "Delete" if parse::<task::DeleteRequest>(request)?.exec_id.is_empty() => {
            let answer = deleted(&c.core.find(id)?.record(), c.pid(id))?;
            c.shut_down(call, id, true).await?;
            bytes(&answer)
        }
        // Of the shim, which is a daemon that stays.
        "Shutdown" => Ok(Vec::new()),
        method => Err(Error::Unimplemented(format!(
            "{method} of a pod's own container: there is none, the pod has a sandbox instead"
        ))),
    }
}

fn deleted(record: &Record, pid: u32) -> Result<task::DeleteResponse> {
    let Some(exit) = &record.exit else {
        return Err(Error::FailedPrecondition(
            "the sandbox runs: it has to be killed first".into(),
        ));
    };
    Ok(task::DeleteResponse {
        pid,
        exit_status: exit.status,
        exited_at: timestamp(exit.at),
        ..Default::default()
    })
}

async fn create(c: &Controller, call: &Call, q: &task::CreateTaskRequest) -> Result<()> {
    let path = Path::new(&q.bundle).join("config.json");
    if !path.is_absolute() {
        return Err(Error::InvalidArgument("bundle must be an absolute path".into()));
    }
    let read = tokio::task::spawn_blocking(move || {
        let mut text = Vec::new();
        std::fs::File::open(&path)?.take(MOST).read_to_end(&mut text)?;
        serde_json::from_slice::<Value>(&text).map_err(std::io::Error::other)
    });
    let spec = read.await.map_err(|e| Error::internal("reading the bundle", e))?;
    let spec =
        spec.map_err(|e| Error::InvalidArgument(format!("{}/config.json: {e}", q.bundle)))?;
    let (config, netns_path) = pod_of(&spec)?;
    let config = config.write_to_bytes().map_err(|e| Error::internal("the configuration", e))?;
    let request = api::ControllerCreateRequest {
        sandbox_id: q.id.clone(),
        options: Some(any("runtime.v1.PodSandboxConfig", config)).into(),
        netns_path,
        ..Default::default()
    };
    c.create(call, request).await?;
    // When it fails nothing is left, as after a failed Start of a sandbox.
    let start = api::ControllerStartRequest { sandbox_id: q.id.clone(), ..Default::default() };
    c.start(call, start).await.map(drop)
}

/// The pod's configuration and network namespace, of the spec of its pause container.
fn pod_of(spec: &Value) -> Result<(PodSandboxConfig, String)> {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    let annotations = spec.get("annotations").and_then(Value::as_object);
    let note = |key: &str| text(annotations.and_then(|all| all.get(&format!("{CRI}{key}"))));
    let number = |key: &str| note(key).parse::<i64>().unwrap_or_default();
    let namespaces = spec.pointer("/linux/namespaces").and_then(Value::as_array);
    let namespace =
        |kind: &str| namespaces.into_iter().flatten().find(|one| text(one.get("type")) == kind);
    if namespace("user").is_some() {
        return Err(Error::Unimplemented(
            "a user namespace for a pod with a pause container: configure the runtime with a \
             sandboxer (containerd 2.1 or later)"
                .into(),
        ));
    }
    let mut config =
        PodSandboxConfig { hostname: text(spec.get("hostname")), ..Default::default() };
    let metadata = config.metadata.mut_or_insert_default();
    metadata.name = note("sandbox-name");
    metadata.namespace = note("sandbox-namespace");
    metadata.uid = note("sandbox-uid");
    config.log_directory = note("sandbox-log-directory");
    let others = annotations.into_iter().flatten().filter(|(key, _)| !key.starts_with(CRI));
    config.annotations = others.map(|(key, value)| (key.clone(), text(Some(value)))).collect();
    let linux = config.linux.mut_or_insert_default();
    linux.cgroup_parent = parent_of(&text(spec.pointer("/linux/cgroupsPath")));
    let sysctls = spec.pointer("/linux/sysctl").and_then(Value::as_object).into_iter().flatten();
    linux.sysctls = sysctls.map(|(key, value)| (key.clone(), text(Some(value)))).collect();
    // Of the pod as a whole: a machine is as large.
    let limits = LinuxContainerResources {
        cpu_period: number("sandbox-cpu-period"),
        cpu_quota: number("sandbox-cpu-quota"),
        cpu_shares: number("sandbox-cpu-shares"),
        memory_limit_in_bytes: number("sandbox-memory"),
        ..Default::default()
    };
    if limits != LinuxContainerResources::default() {
        linux.resources = Some(limits).into();
    }
    let options =
        linux.security_context.mut_or_insert_default().namespace_options.mut_or_insert_default();
    let mode = |kind: &str| {
        let there = namespace(kind).is_some();
        EnumOrUnknown::new(if there { NamespaceMode::POD } else { NamespaceMode::NODE })
    };
    (options.network, options.ipc, options.pid) = (mode("network"), mode("ipc"), mode("pid"));
    let netns = namespace("network").map(|one| text(one.get("path"))).unwrap_or_default();
    if namespace("network").is_some() && netns.is_empty() {
        return Err(Error::InvalidArgument("the pod's network namespace has no path".into()));
    }
    Ok((config, netns))
}

/// The pod's cgroup, of that of its pause container: `/kubepods/pod1/<id>`, or with systemd
/// `kubepods-pod1.slice:cri-containerd:<id>`.
fn parent_of(cgroup: &str) -> String {
    match cgroup.split_once(':') {
        Some((slice, _)) if !slice.is_empty() => kuasar_host::cgroup::expand_systemd(slice),
        Some(_) => String::new(),
        None => cgroup.rsplit_once('/').map(|(parent, _)| parent.to_owned()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_configuration_is_made_of_its_pause_containers_spec() {
        let spec: Value = serde_json::from_str(
            r#"{"hostname": "web", "annotations": {"io.kubernetes.cri.sandbox-name": "web-0",
                "io.kubernetes.cri.sandbox-namespace": "shop", "io.kubernetes.cri.sandbox-uid": "u",
                "io.kubernetes.cri.sandbox-memory": "1048576", "io.kuasar.runc.engine": "crun"},
                "linux": {"cgroupsPath": "/kubepods/pod1/abc", "sysctl": {"net.core.somaxconn": "9"},
                "namespaces": [{"type": "pid"}, {"type": "network", "path": "/var/run/netns/x"}]}}"#,
        )
        .unwrap();
        let (config, netns) = pod_of(&spec).unwrap();
        assert_eq!((config.hostname.as_str(), netns.as_str()), ("web", "/var/run/netns/x"));
        assert_eq!(config.metadata.namespace, "shop");
        assert_eq!(config.annotations.len(), 1);
        let linux = &config.linux;
        assert_eq!((linux.cgroup_parent.as_str(), linux.sysctls.len()), ("/kubepods/pod1", 1));
        assert_eq!(linux.resources.memory_limit_in_bytes, 1 << 20);
        let options = &linux.security_context.namespace_options;
        assert_eq!(options.pid.enum_value_or_default(), NamespaceMode::POD);
        assert_eq!(options.ipc.enum_value_or_default(), NamespaceMode::NODE);
        let user = serde_json::json!({"linux": {"namespaces": [{"type": "user"}]}});
        assert!(matches!(pod_of(&user), Err(Error::Unimplemented(_))));
        let no_path = serde_json::json!({"linux": {"namespaces": [{"type": "network"}]}});
        assert!(matches!(pod_of(&no_path), Err(Error::InvalidArgument(_))));
    }

    #[test]
    fn the_pods_cgroup_is_above_its_pause_containers() {
        assert_eq!(parent_of("/kubepods/pod1/abc"), "/kubepods/pod1");
        assert_eq!(parent_of("a-b.slice:cri-containerd:abc"), "/a.slice/a-b.slice");
        assert_eq!((parent_of(""), parent_of("/abc"), parent_of(":x:y")), Default::default());
    }
}
