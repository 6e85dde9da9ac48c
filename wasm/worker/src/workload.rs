//! What runs in a container: a compiled module or component.
//!
//! [`Wasm::prepare`] comes when the process is in the container, has its user, no privileges and
//! its seccomp filter. Everything that can be wrong with the module is found there, so that it is
//! the answer to Create: that it cannot be loaded, imports that do not exist, a world that is
//! unknown, more memory than the container has. After Start [`Wasm::run`] has only to instantiate
//! and to call.
//!
//! A container is a process, so that ends it what ends a process: SIGKILL, and SIGTERM by a
//! handler (as the first process of a PID namespace it would not be ended without one).

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};

use kuasar_oci::builtin::workload::{Container, Workload};
use wasm_common::job::{self, Job};
use wasm_common::kind::Kind;
use wasmtime::component::{self, InstancePre as ComponentPre};
use wasmtime::{InstancePre, ResourcesRequired, Store};
use wasmtime_wasi::I32Exit;
use wasmtime_wasi::p2::bindings::CommandPre;
use wasmtime_wasi_http::p2::bindings::ProxyPre;

use crate::engine::{self, Warm, explain};
use crate::serve::{self, Server};
use crate::state::{Component, Module, World, limits};
use crate::{code, zygote};

/// What a trap is answered with: 128 + SIGABRT, as a program that ends itself.
const TRAPPED: i32 = 134;
/// Bytes of a page of linear memory.
const PAGE: u64 = 65536;
/// Signals that end a program that does not handle them, and that people send for that.
const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGHUP];

/// A container's program.
pub struct Wasm {
    warm: &'static Warm,
    ready: Option<Ready>,
}

struct Ready {
    runtime: tokio::runtime::Runtime,
    program: Program,
    world: World,
    memory: u64,
}

enum Program {
    Module(Box<InstancePre<Module>>),
    Command(Box<CommandPre<Component>>),
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
        let text = container.annotations.and_then(|all| all.get(job::ANNOTATION));
        let job = Job::from_json(text.ok_or("the spec has no job for this engine")?)?;
        let mut keep: Vec<i32> = container.kept.iter().map(AsRawFd::as_raw_fd).collect();
        keep.push(job.artifact);
        keep.extend(self.warm.random);
        close_others(&mut keep);
        if job.artifact < 3 {
            return Err(format!("descriptor {} is no artifact", job.artifact));
        }
        // SAFETY: the sandboxer has passed it on under this number, for nobody else.
        let artifact = unsafe { File::from_raw_fd(job.artifact) };
        end_by_signals();
        let program = container.args.first().and_then(|path| path.rsplit('/').next());
        zygote::name(program.unwrap_or("wasm"));
        let program = self.load(&job, artifact)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| format!("event loop: {error}"))?;
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
        self.ready = Some(Ready { runtime, program, world, memory: job.memory });
        Ok(())
    }

    fn run(self: Box<Self>) -> String {
        let Some(ready) = self.ready else { return "not prepared".into() };
        let code = ready.runtime.block_on(run(ready.program, ready.world, ready.memory));
        exit(code)
    }
}

impl Wasm {
    fn load(&self, job: &Job, artifact: File) -> Result<Program, String> {
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
                let pre = self.warm.modules.instantiate_pre(&module).map_err(theirs)?;
                Ok(Program::Module(Box::new(pre)))
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
                        Ok(Program::Command(Box::new(pre)))
                    }
                    Some(Exports::Handler) => {
                        drop(component);
                        let engine = engine::pooled(job.connections.max(1), job.memory)
                            .map_err(|error| explain(&error))?;
                        let linker = engine::components(&engine).map_err(|e| explain(&e))?;
                        let component = code::component(&engine, &artifact).map_err(theirs)?;
                        let pre = linker.instantiate_pre(&component).map_err(theirs)?;
                        let pre = ProxyPre::new(pre).map_err(theirs)?;
                        let (port, connections) = (job.port, job.connections.max(1));
                        Ok(Program::Server(Box::new(Server::new(pre, port, connections))))
                    }
                    None => Err("exec: the component exports neither wasi:cli/run@0.2 nor \
                                 wasi:http/incoming-handler@0.2: its world is unknown here"
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
        if name.starts_with("wasi:http/incoming-handler@0.2.") {
            found = Some(Exports::Handler);
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

async fn run(program: Program, world: World, memory: u64) -> i32 {
    let result = match program {
        Program::Module(pre) => module(&pre, &world, memory).await,
        Program::Command(pre) => command(&pre, &world, memory).await,
        Program::Server(server) => serve::run(*server, world, memory).await,
    };
    let Err(error) = result else { return 0 };
    if let Some(I32Exit(code)) = error.downcast_ref::<I32Exit>() {
        // As exit(2) does it.
        return code & 0xff;
    }
    say(&error);
    TRAPPED
}

async fn module(pre: &InstancePre<Module>, world: &World, memory: u64) -> wasmtime::Result<()> {
    let wasi = world.context()?.build_p1();
    let mut store = Store::new(pre.module().engine(), Module { wasi, limits: limits(memory) });
    store.limiter(|state| &mut state.limits);
    let instance = pre.instantiate_async(&mut store).await?;
    let start = instance.get_typed_func::<(), ()>(&mut store, "_start")?;
    start.call_async(&mut store, ()).await
}

async fn command(pre: &CommandPre<Component>, world: &World, memory: u64) -> wasmtime::Result<()> {
    let state = Component::new(world.context()?.build(), memory);
    let mut store = Store::new(pre.engine(), state);
    store.limiter(|state| &mut state.limits);
    let instance = pre.instantiate_async(&mut store).await?;
    match instance.wasi_cli_run().call_run(&mut store).await? {
        Ok(()) => Ok(()),
        // The program itself says that it has failed, and no more.
        Err(()) => Err(I32Exit(1).into()),
    }
}

/// Tells the container's log why its program was ended.
fn say(error: &wasmtime::Error) {
    // Nobody is left to tell when it cannot be written.
    let _ = writeln!(std::io::stderr(), "Error: {error:?}");
}

/// Ends the process with what was written.
fn exit(code: i32) -> ! {
    let _ = std::io::stdout().flush();
    // SAFETY: nothing has to be undone that the end of the process does not undo.
    unsafe { libc::_exit(code) }
}

/// Closes every descriptor from 3 on that is not in `keep`.
fn close_others(keep: &mut Vec<i32>) {
    keep.retain(|fd| *fd >= 3);
    keep.sort_unstable();
    keep.dedup();
    let mut first = 3;
    for fd in keep.iter() {
        if *fd > first {
            close_range(first, *fd - 1);
        }
        first = fd + 1;
    }
    close_range(first, i32::MAX);
}

fn close_range(first: i32, last: i32) {
    // SAFETY: what is closed belongs to the process that made this one, and is used by nobody here.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

extern "C" fn ended(signal: libc::c_int) {
    // SAFETY: async-signal-safe; what was written is in the kernel's hands.
    unsafe { libc::_exit(128 + signal) }
}

fn end_by_signals() {
    for signal in ENDING {
        let handler = ended as extern "C" fn(libc::c_int);
        // SAFETY: the handler does nothing but to end the process.
        unsafe { libc::signal(signal, handler as usize) };
    }
}
