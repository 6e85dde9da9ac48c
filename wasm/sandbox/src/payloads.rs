//! Which engine makes a container: the worker for WebAssembly, the built-in one for the rest.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use containerd_task::error::{Error, Result};
use kuasar_host::live::Live;
use kuasar_oci::engine::BUILTIN;
use kuasar_oci::payloads::{Candidate, Chosen, Payloads};
use serde_json::Value;
use wasm_common::job::{Budget, Form, Job};
use wasm_common::kind::{Detected, Kind};
use wasm_image::{self as image, Program, shown};

use crate::compile::Compiler;
use crate::config::{Config, ENGINES, PORT_ANNOTATION, USERNS_ENGINE, WASMEDGE};
use crate::worker::Workers;
use crate::{flavor, spec};

/// What a pod has asked for.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Its engine.
    pub engine: String,
    /// What its programs may spend.
    pub budget: Budget,
    /// Port by annotation.
    pub port: Option<u16>,
    /// Its only port.
    pub only_port: Option<u16>,
}

/// Chooses for the containers of one pod.
pub struct Modules {
    config: Live<Config>,
    workers: Arc<Workers>,
    compiler: Arc<Compiler>,
    asked: Asked,
}

impl Modules {
    /// With the configuration as it is at each call.
    pub fn new(
        config: Live<Config>,
        workers: Arc<Workers>,
        compiler: Arc<Compiler>,
        asked: Asked,
    ) -> Self {
        Self { config, workers, compiler, asked }
    }

    /// Port on which a component that answers requests is served: by annotation, by environment,
    /// the pod's only one, or the configuration's.
    fn port(&self, spec: &Value) -> Result<u16> {
        let config = self.config.get();
        let own = spec::annotation(spec, PORT_ANNOTATION).filter(|_| config.heeds(PORT_ANNOTATION));
        if let Some(text) = own {
            return flavor::port(text).map_err(Error::InvalidArgument);
        }
        if let Some(port) = self.asked.port {
            return Ok(port);
        }
        if let Some(text) = spec::variable(spec, &config.http.port_env) {
            return text.trim().parse().ok().filter(|port| *port != 0).ok_or_else(|| {
                let name = &config.http.port_env;
                Error::InvalidArgument(format!("environment {name}={text:.40?} is no port"))
            });
        }
        Ok(self.asked.only_port.unwrap_or(config.http.port))
    }

    async fn wasm(
        &self,
        program: Program,
        kind: Kind,
        candidate: &Candidate,
        spec: &mut Value,
    ) -> Result<Chosen> {
        let config = self.config.get();
        let engine = self.asked.engine.as_str();
        let worker = self.workers.worker(engine);
        let worker = worker.map_err(|error| Error::internal("choose the engine", error))?;
        let hello = worker.hello().await;
        let hello = hello.map_err(|error| Error::internal("start the worker", error))?;
        let edge = engine == WASMEDGE;
        if edge && kind == Kind::Component {
            return Err(Error::InvalidArgument(format!(
                "exec: {} is a component, and components do not run on WasmEdge here: use the \
                 engine wasmtime for it",
                shown(program.path.as_os_str())
            )));
        }
        let port = if kind == Kind::Component { self.port(spec)? } else { 0 };
        let of = |name: &str| spec::annotation(spec, name);
        let budget = flavor::budget(&config, of, self.asked.budget);
        let budget = budget.map_err(Error::InvalidArgument)?;
        // WasmEdge's code is always ended with its process.
        let variant = if edge {
            Budget { time: 0, ..budget }.variant(false).to_owned()
        } else {
            config.variant(&budget, kind)
        };
        let path = program.path.to_string_lossy().into_owned();
        let layers = layers(candidate);
        let begun = Instant::now();
        let (form, artifact, digest): (_, OwnedFd, _) = if program.shared {
            let digest = self.compiler.digest(&program, &layers).await?;
            (Form::Shared, program.file.into(), digest)
        } else if edge && !config.wasmedge.compile {
            let digest = self.compiler.digest(&program, &layers).await?;
            (Form::Module, program.file.into(), digest)
        } else {
            let made = self.compiler.artifact(&hello, program, &layers, &variant).await?;
            (Form::Compiled, made.0.into(), made.1)
        };
        kuasar_daemon::metrics::observe("wasm_artifact", begun.elapsed());
        let job = Job {
            artifact: candidate.descriptor,
            form,
            path,
            digest,
            kind,
            memory: spec::memory_limit(spec),
            port,
            connections: config.http.max_connections,
            budget,
            variant,
            threads: config.max_threads,
        };
        spec::edit(spec, &job).map_err(Error::InvalidArgument)?;
        Ok(Chosen { engine: engine.to_owned(), descriptors: vec![artifact] })
    }

    /// A shared object that WasmEdge's compiler has made and the image brings: only where the
    /// operator has said that images may.
    async fn shared(
        &self,
        program: Program,
        candidate: &Candidate,
        spec: &mut Value,
    ) -> Result<Chosen> {
        if !self.config.get().wasmedge.image_code {
            return Err(Error::InvalidArgument(format!(
                "exec: {} is a shared object, which is native code of the image: it runs where \
                 wasmedge.image_code is on; the module that it was made of runs without",
                shown(program.path.as_os_str())
            )));
        }
        self.wasm(program, Kind::Module, candidate, spec).await
    }
}

/// What a rootfs is made of, as far as it can be known: with a file's number and times in it, that
/// names the file's content. Of an overlay it is the layers below that name it, which containers of an
/// image share; what a container writes itself has a number and times of its own.
fn layers(candidate: &Candidate) -> String {
    let mut text = String::new();
    for mount in &candidate.mounts {
        let own = |option: &&String| {
            mount.kind != "overlay"
                || !(option.starts_with("upperdir=") || option.starts_with("workdir="))
        };
        text.push_str(&mount.source);
        for option in mount.options.iter().filter(own) {
            text.push('\n');
            text.push_str(option);
        }
    }
    text
}

#[async_trait]
impl Payloads for Modules {
    async fn choose(&self, candidate: &Candidate, spec: &mut Value) -> Result<Chosen> {
        let own_users = candidate.pod.namespaces.user.is_some();
        let engine = if own_users { USERNS_ENGINE } else { BUILTIN };
        let native = || Chosen { engine: engine.into(), descriptors: Vec::new() };
        let natives = self.config.get().native_containers;
        // A few system calls in a mounted tree: not worth another thread.
        let found = image::program(&candidate.rootfs, spec).map_err(Error::InvalidArgument)?;
        let Some(program) = found else {
            if natives {
                // It has the words for what is missing.
                return Ok(native());
            }
            let name = spec.pointer("/process/args/0").and_then(Value::as_str).unwrap_or_default();
            return Err(Error::InvalidArgument(format!(
                "exec: {}: no such file or directory",
                shown(name.as_ref())
            )));
        };
        let name = shown(program.path.as_os_str());
        if program.shared && self.asked.engine == WASMEDGE {
            return self.shared(program, candidate, spec).await;
        }
        match program.what {
            Detected::Wasm(kind) => self.wasm(program, kind, candidate, spec).await,
            Detected::Other if natives => Ok(native()),
            Detected::Other => Err(Error::InvalidArgument(format!(
                "exec: {name} is no WebAssembly, and native_containers is off: use another \
                 runtime class for it"
            ))),
            Detected::Truncated => Err(Error::InvalidArgument(format!(
                "exec: {name} is WebAssembly that ends within its header: it is truncated"
            ))),
            Detected::Unknown { version, layer } => Err(Error::InvalidArgument(format!(
                "exec: {name} is WebAssembly of version {version:#x}, layer {layer}: modules of \
                 version 1 and components of version 0xd are known"
            ))),
        }
    }

    fn check_exec(&self, engine: &str) -> Result<()> {
        if !ENGINES.contains(&engine) {
            return Ok(());
        }
        Err(Error::Unimplemented(
            "a WebAssembly container has no further processes: there is no program in it that \
             could be executed. Run a native container in the same pod for a shell"
                .into(),
        ))
    }
}
