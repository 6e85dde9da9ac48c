//! The program as containerd runs it, against a daemon's Endpoint service.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // helpers of tests

use std::collections::HashMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use async_trait::async_trait;
use kuasar_protos::endpoint as api;
use kuasar_protos::endpoint_ttrpc::{Endpoint, create_endpoint};
use kuasar_protos::shim::api::DeleteResponse;
use kuasar_protos::shim::types::introspection::RuntimeInfo;
use protobuf::{Message, MessageField};

/// A daemon that knows pod `pod` and the ended container `ended`.
struct FakeDaemon;

#[async_trait]
impl Endpoint for FakeDaemon {
    async fn open(
        &self,
        _: &ttrpc::r#async::TtrpcContext,
        q: api::OpenRequest,
    ) -> ttrpc::Result<api::OpenResponse> {
        if q.existing && q.sandbox_id != "pod" {
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
                ttrpc::Code::NOT_FOUND,
                "sandbox is not known",
            )));
        }
        assert_eq!(q.existing, q.bundle.is_empty());
        let address = format!("unix:///run/pods/{}.sock", q.sandbox_id);
        Ok(api::OpenResponse { address, ..Default::default() })
    }

    async fn probe(
        &self,
        _: &ttrpc::r#async::TtrpcContext,
        q: api::ProbeRequest,
    ) -> ttrpc::Result<api::ProbeResponse> {
        let mut a = api::ProbeResponse::new();
        if q.container_id == "ended" {
            (a.pid, a.exit_status) = (7, 3);
            a.exited_at = MessageField::some(std::time::UNIX_EPOCH.into());
        }
        Ok(a)
    }
}

struct Bed {
    dir: tempfile::TempDir,
    program: PathBuf,
    _server: (tokio::runtime::Runtime, ttrpc::r#async::Server),
}

fn bed() -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("containerd-shim-kuasar-test-v1");
    symlink(env!("CARGO_BIN_EXE_containerd-shim-kuasar"), &program).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let address = format!("unix://{}", dir.path().join("d.sock").display());
    let server = runtime.block_on(async {
        let mut server = ttrpc::r#async::Server::new()
            .bind(&address)
            .unwrap()
            .register_service(create_endpoint(Arc::new(FakeDaemon)));
        server.start().await.unwrap();
        server
    });
    Bed { dir, program, _server: (runtime, server) }
}

impl Bed {
    fn run(&self, bundle: &Path, words: &[&str]) -> Output {
        std::fs::create_dir_all(bundle).unwrap();
        Command::new(&self.program)
            .args(words)
            .env_clear()
            .envs(HashMap::from([("KUASAR_TEST_SOCKET", self.dir.path().join("d.sock"))]))
            .current_dir(bundle)
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap()
    }

    fn bundle(&self, kind: &str, id: &str) -> PathBuf {
        self.dir.path().join(kind).join("k8s.io").join(id)
    }
}

#[test]
fn start_prints_the_answer_and_nothing_else_and_leaves_the_address() {
    let bed = bed();
    let bundle = bed.bundle("io.containerd.sandbox.controller.v1.shim", "new");
    let out = bed.run(&bundle, &["-namespace", "k8s.io", "-id", "new", "start"]);
    assert!(out.status.success(), "{out:?}");
    assert!(out.stderr.is_empty());
    let answer: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let expected = serde_json::json!(
        { "version": 3, "address": "unix:///run/pods/new.sock", "protocol": "ttrpc" });
    assert_eq!(answer, expected);
    let address = std::fs::read_to_string(bundle.join("address")).unwrap();
    assert_eq!(address, "unix:///run/pods/new.sock");
}

#[test]
fn a_container_gets_the_address_of_its_pod() {
    let bed = bed();
    let bundle = bed.bundle("io.containerd.runtime.v2.task", "c");
    std::fs::create_dir_all(&bundle).unwrap();
    std::fs::write(bundle.join("sandbox"), "pod").unwrap();
    let out = bed.run(&bundle, &["-id", "c", "start"]);
    let answer: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(answer["address"], "unix:///run/pods/pod.sock");
    assert_eq!(answer["version"], 2);
    std::fs::write(bundle.join("sandbox"), "other").unwrap();
    let out = bed.run(&bundle, &["-id", "c", "start"]);
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("sandbox is not known"), "{out:?}");
}

#[test]
fn delete_reports_what_is_known_and_never_fails() {
    let bed = bed();
    let bundle = bed.bundle("x", "y");
    let out = bed.run(&bundle, &["-id", "ended", "-bundle", "/gone", "delete"]);
    let answer = DeleteResponse::parse_from_bytes(&out.stdout).unwrap();
    assert_eq!((answer.pid, answer.exit_status), (7, 3));
    let out = bed.run(&bundle, &["-id", "unknown", "delete"]);
    assert_eq!(DeleteResponse::parse_from_bytes(&out.stdout).unwrap().exit_status, 255);
    std::fs::remove_file(bed.dir.path().join("d.sock")).unwrap();
    let out = bed.run(&bundle, &["-id", "ended", "delete"]);
    assert!(out.status.success());
    assert!(DeleteResponse::parse_from_bytes(&out.stdout).unwrap().exited_at.is_some());
}

#[test]
fn info_and_version_need_no_daemon() {
    let bed = bed();
    let bundle = bed.bundle("x", "y");
    let out = bed.run(&bundle, &["-info"]);
    let info = RuntimeInfo::parse_from_bytes(&out.stdout).unwrap();
    assert_eq!(info.name, "io.containerd.kuasar-test.v1");
    let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
    assert_eq!(features["linux"]["cgroup"]["v2"], true);
    let out = bed.run(&bundle, &["-v"]);
    assert!(String::from_utf8_lossy(&out.stdout).contains("Version:"));
}
