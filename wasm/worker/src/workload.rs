//! What runs in a container: a compiled module or component.
//!
//! [`Wasm::prepare`] comes when the process is in the container, has its user, no privileges and
//! its seccomp filter; Create has been answered. Everything that can be wrong with the module is found
//! there, so that it is the answer to Start: that it cannot be loaded, imports that do not exist, a world
//! that is unknown, more memory than the container has. After Start [`Wasm::run`] has only to instantiate
//! and to call.
//!
//! How it is ended, see [`wasm_process::container`]: code that was compiled for it is interrupted
//! by the epoch and traps; for other code the process ends where it is.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::time::Duration;

use kuasar_oci::builtin::workload::{Container, Workload};
use wasm_common::job::{Budget, Form, Job};
use wasm_common::kind::Kind;
use wasm_process::container::{self, SPENT, TRAPPED, close_others, exit, on_signals, say};
use wasm_process::{memory, zygote};
use wasmtime::component::{self, InstancePre as ComponentPre};
use wasmtime::{Engine, InstancePre, ResourcesRequired, Store, Trap};
use wasmtime_wasi::I32Exit;
use wasmtime_wasi::p2::bindings::CommandPre;
use wasmtime_wasi_http::p2::bindings::ProxyPre;

use crate::code;
use crate::engine::{self, Variant, Warm, explain};
use crate::serve::{self, Answering, Server};
use crate::state::{Component, Module, World};
use crate::threads::{self, Threads};
use crate::wasip3;

/// Bytes of a page of linear memory.
const PAGE: u64 = 65536;

/// A container's program.
pub struct Wasm {
    warm: &'static Warm,
    ready: Option<Ready>,
}

struct Ready {
    runtime: tokio::runtime::Runtime,
    program: Program,
    world: World,
    bounds: Bounds,
}

/// What holds a store.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Most bytes of one linear memory when it was made; 0 for no bound. How far it may grow is
    /// [`memory::fits`]'s to say.
    pub memory: u64,
    /// What the program may spend.
    pub budget: Budget,
    /// How its code was compiled.
    pub variant: Variant,
}

impl Bounds {
    /// Holds a new store.
    ///
    /// # Errors
    /// When its code does not count.
    pub fn hold<T>(&self, store: &mut Store<T>) -> wasmtime::Result<()> {
        if self.variant.fuel {
            store.set_fuel(self.budget.fuel)?;
        }
        if self.variant.epoch {
            // The first tick is the end.
            store.set_epoch_deadline(1);
        }
        Ok(())
    }
}

enum Program {
    Module(Box<(InstancePre<Module>, Option<Arc<Threads>>)>),
    Command(Box<CommandPre<Component>>),
    Command3(Box<wasip3::CommandPre<Component>>),
    Server(Box<Server>),
}

impl Wasm {
    /// A program that is not known yet.
    pub fn new(warm: &'static Warm) -> Self {
        Self { warm, ready: None }
    }
}

impl Workload for Wasm {
    fn prepare(&mut self, container: &Container<'_>) -> Result<(), String> {
        let job = container::job(container)?;
        let mut keep: Vec<i32> = container.kept.iter().map(AsRawFd::as_raw_fd).collect();
        keep.push(job.artifact);
        keep.extend(self.warm.random);
        close_others(keep);
        if job.artifact < 3 || job.form != Form::Compiled {
            return Err(format!("descriptor {} is no compiled code", job.artifact));
        }
        // SAFETY: the sandboxer has passed it on under this number, for nobody else.
        let artifact = unsafe { File::from_raw_fd(job.artifact) };
        let variant = Variant::parse(&job.variant)?;
        if variant != Variant::default() {
            // What is warm runs code that neither counts nor can be interrupted.
            let random = self.warm.random;
            let warm = Warm::of(variant).map_err(|error| explain(&error))?;
            self.warm = Box::leak(Box::new(Warm { random, ..warm }));
        }
        let program = container.args.first().and_then(|path| path.rsplit('/').next());
        zygote::name(program.unwrap_or("wasm"));
        let world = World {
            args: container.args.to_vec(),
            env: container
                .env
                .iter()
                .filter_map(|entry| entry.split_once('='))
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            cwd: container.cwd.to_owned(),
        };
        memory::hold(job.memory)?;
        let bounds = Bounds { memory: job.memory, budget: job.budget, variant };
        let (program, engine) = self.load(&job, artifact, &world, bounds)?;
        let interrupt = move || engine.increment_epoch();
        on_signals(variant.epoch.then(|| Box::new(interrupt) as Box<dyn Fn() + Send + Sync>));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| format!("event loop: {error}"))?;
        self.ready = Some(Ready { runtime, program, world, bounds });
        Ok(())
    }

    fn run(self: Box<Self>) -> String {
        let Some(ready) = self.ready else { return "not prepared".into() };
        if ready.bounds.budget.time > 0 {
            container::end_after(Duration::from_millis(ready.bounds.budget.time));
        }
        let code = ready.runtime.block_on(run(ready.program, ready.world, ready.bounds));
        exit(code)
    }
}

impl Wasm {
    /// The program, and the engine that it runs in.
    fn load(
        &self,
        job: &Job,
        artifact: File,
        world: &World,
        bounds: Bounds,
    ) -> Result<(Program, Engine), String> {
        let theirs = |error: wasmtime::Error| format!("exec: {}", explain(&error));
        match job.kind {
            Kind::Module => {
                let module = code::module(&self.warm.engine, artifact).map_err(theirs)?;
                fits(&module.resources_required(), job.memory)?;
                match module.get_export("_start") {
                    Some(wasmtime::ExternType::Func(_)) => {}
                    _ => {
                        return Err("exec: the module has no function _start: it is a library, \
                                    not a program"
                            .into());
                    }
                }
                let engine = self.warm.engine.clone();
                if threads::wanted(&module) {
                    let made = Threads::link(self.warm, &module, world, bounds, job.threads);
                    let (pre, threads) = made.map_err(theirs)?;
                    return Ok((Program::Module(Box::new((pre, Some(threads)))), engine));
                }
                let pre = self.warm.modules.instantiate_pre(&module).map_err(theirs)?;
                Ok((Program::Module(Box::new((pre, None))), engine))
            }
            Kind::Component => {
                let component = code::component(&self.warm.engine, &artifact).map_err(theirs)?;
                if let Some(required) = component.resources_required() {
                    fits(&required, job.memory)?;
                }
                match world_of(&component) {
                    Some(Exports::Run) => {
                        let pre = self.pre(&component)?;
                        let pre = CommandPre::new(pre).map_err(theirs)?;
                        Ok((Program::Command(Box::new(pre)), self.warm.engine.clone()))
                    }
                    Some(Exports::Run3) => {
                        let pre = self.pre(&component)?;
                        let pre = wasip3::CommandPre::new(pre).map_err(theirs)?;
                        Ok((Program::Command3(Box::new(pre)), self.warm.engine.clone()))
                    }
                    Some(exports @ (Exports::Handler | Exports::Handler3)) => {
                        drop(component);
                        let engine =
                            engine::pooled(bounds.variant, job.connections.max(1), job.memory);
                        let engine = engine.map_err(|error| explain(&error))?;
                        let linker = engine::components(&engine, bounds.variant);
                        let linker = linker.map_err(|error| explain(&error))?;
                        let component = code::component(&engine, &artifact).map_err(theirs)?;
                        let pre = linker.instantiate_pre(&component).map_err(theirs)?;
                        let pre = match exports {
                            Exports::Handler3 => wasip3::ServicePre::new(pre).map(Answering::P3),
                            _ => ProxyPre::new(pre).map(Answering::P2),
                        };
                        let pre = pre.map_err(theirs)?;
                        let (port, connections) = (job.port, job.connections.max(1));
                        let server = Server::new(pre, port, connections);
                        Ok((Program::Server(Box::new(server)), engine))
                    }
                    None => Err("exec: the component exports neither wasi:cli/run@0.2 nor \
                                 wasi:http/incoming-handler@0.2, nor their like of 0.3: its world \
                                 is unknown here"
                        .into()),
                }
            }
        }
    }

    fn pre(&self, component: &component::Component) -> Result<ComponentPre<Component>, String> {
        self.warm
            .components
            .instantiate_pre(component)
            .map_err(|error| format!("exec: {}", explain(&error)))
    }
}

enum Exports {
    Run,
    Handler,
    Run3,
    Handler3,
}

/// What can be done with a component.
fn world_of(component: &component::Component) -> Option<Exports> {
    let kind = component.component_type();
    let engine = component.engine();
    let mut found = None;
    for (name, _) in kind.exports(engine) {
        if name.starts_with("wasi:cli/run@0.2.") {
            return Some(Exports::Run);
        }
        if name.starts_with("wasi:cli/run@0.3.") {
            return Some(Exports::Run3);
        }
        if name.starts_with("wasi:http/incoming-handler@0.2.") {
            found = Some(Exports::Handler);
        }
        if name.starts_with("wasi:http/handler@0.3.") {
            found = Some(Exports::Handler3);
        }
    }
    found
}

/// Whether initial memories fit into the container.
fn fits(required: &ResourcesRequired, memory: u64) -> Result<(), String> {
    let wanted = required.max_initial_memory_size.unwrap_or(0).saturating_mul(PAGE);
    if memory > 0 && wanted > memory {
        return Err(format!(
            "exec: a linear memory of {wanted} bytes is asked for, and the container has a limit \
             of {memory}: permission denied"
        ));
    }
    Ok(())
}

async fn run(program: Program, world: World, bounds: Bounds) -> i32 {
    let result = match program {
        Program::Module(module) => run_module(*module, &world, bounds).await,
        Program::Command(pre) => command(&pre, &world, bounds).await,
        Program::Command3(pre) => wasip3::command(&pre, &world, bounds).await,
        Program::Server(server) => serve::run(*server, world, bounds).await,
    };
    match result {
        Ok(()) => 0,
        Err(error) => code_of(&error),
    }
}

/// The exit code of a program that was ended by this, after the container's log was told why.
pub fn code_of(error: &wasmtime::Error) -> i32 {
    if let Some(I32Exit(code)) = error.downcast_ref::<I32Exit>() {
        // As exit(2) does it.
        return code & 0xff;
    }
    match (error.downcast_ref::<Trap>(), container::asked()) {
        (Some(Trap::Interrupt), Some(signal)) => {
            let (code, words) = container::ended_by(signal);
            say(words);
            code
        }
        (Some(Trap::OutOfFuel), _) => {
            say(&format!("its fuel is used up: {error:?}"));
            SPENT
        }
        _ => {
            say(&format!("{error:?}"));
            TRAPPED
        }
    }
}

async fn run_module(
    (pre, threads): (InstancePre<Module>, Option<Arc<Threads>>),
    world: &World,
    bounds: Bounds,
) -> wasmtime::Result<()> {
    let wasi = world.context()?.build_p1();
    let state = Module::new(wasi, threads);
    let mut store = Store::new(pre.module().engine(), state);
    store.limiter(|state| &mut state.limits);
    bounds.hold(&mut store)?;
    let instance = pre.instantiate_async(&mut store).await?;
    let start = instance.get_typed_func::<(), ()>(&mut store, "_start")?;
    start.call_async(&mut store, ()).await
}

async fn command(
    pre: &CommandPre<Component>,
    world: &World,
    bounds: Bounds,
) -> wasmtime::Result<()> {
    let mut store = Component::store(pre.engine(), world, bounds)?;
    let instance = pre.instantiate_async(&mut store).await?;
    match instance.wasi_cli_run().call_run(&mut store).await? {
        Ok(()) => Ok(()),
        // The program itself says that it has failed, and no more.
        Err(()) => Err(I32Exit(1).into()),
    }
}
