//! Threads of core modules, by the proposal wasi-threads: a module imports a shared memory and
//! `wasi` `thread-spawn`, and exports `wasi_thread_start`. Each thread is one of the kernel's, with
//! an instance of its own on the same memory.
//!
//! Wasmtime's own crate for this ended with its version 46, together with the one implementation of
//! WASI whose descriptors threads can share. So here each thread has WASI of its own: standard
//! streams and preopened directories are the same in all of them, a file that one thread has opened
//! is that thread's.
//!
//! Threads are bounded three times: by the configuration, by the container's limit of processes,
//! and by its memory.

use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use wasm_process::container;
use wasmtime::{
    Caller, ExternType, InstancePre, MemoryTypeBuilder, SharedMemory, Store, bail, ensure,
};

use crate::engine::Warm;
use crate::state::{Module, World};
use crate::workload::{Bounds, code_of};

/// Module and name of the import.
const SPAWN: (&str, &str) = ("wasi", "thread-spawn");
/// Name of the export.
const START: &str = "wasi_thread_start";
/// Highest number of a thread that the proposal allows.
const MAX_ID: i32 = 0x1fff_ffff;
/// Bytes of a page of linear memory.
const PAGE: u64 = 65536;

/// Makes the threads of one program.
pub struct Threads {
    pre: OnceLock<InstancePre<Module>>,
    world: World,
    bounds: Bounds,
    last: AtomicI32,
    running: AtomicU32,
    max: u32,
}

/// Whether a module is one that makes threads.
pub fn wanted(module: &wasmtime::Module) -> bool {
    module.imports().any(|import| {
        (import.module(), import.name()) == SPAWN
            || matches!(import.ty(), ExternType::Memory(memory) if memory.is_shared())
    })
}

impl Threads {
    /// Links a module with its shared memory, and with what makes at most `max` threads.
    ///
    /// # Errors
    /// When imports do not exist, or its memory is larger than the container's.
    pub fn link(
        warm: &Warm,
        module: &wasmtime::Module,
        world: &World,
        bounds: Bounds,
        max: u32,
    ) -> wasmtime::Result<(InstancePre<Module>, Arc<Self>)> {
        let threads = Arc::new(Self {
            pre: OnceLock::new(),
            world: world.clone(),
            bounds,
            last: AtomicI32::new(0),
            running: AtomicU32::new(0),
            max,
        });
        let mut linker = warm.modules.clone();
        linker.func_wrap(SPAWN.0, SPAWN.1, |caller: Caller<'_, Module>, argument: i32| {
            // A negative number says that there is no thread.
            caller.data().threads.as_ref().and_then(|all| all.clone().spawn(argument)).unwrap_or(-1)
        })?;
        let store = threads.store(&warm.engine)?;
        for import in module.imports() {
            let ExternType::Memory(wanted) = import.ty() else { continue };
            ensure!(wanted.is_shared(), "a memory is imported that is not shared");
            let most = match bounds.memory {
                0 => u64::MAX,
                bytes => bytes / PAGE,
            };
            if wanted.minimum() > most {
                bail!(
                    "a shared linear memory of {} bytes is asked for, and the container has a \
                     limit of {}: permission denied",
                    wanted.minimum().saturating_mul(PAGE),
                    bounds.memory
                );
            }
            // The store's bounds do not hold a memory that belongs to no store.
            let most = wanted.maximum().unwrap_or(most).min(most);
            let kind = MemoryTypeBuilder::new()
                .min(wanted.minimum())
                .max(Some(most))
                .shared(true)
                .memory64(wanted.is_64())
                .build()?;
            let memory = SharedMemory::new(&warm.engine, kind)?;
            linker.define(&store, import.module(), import.name(), memory)?;
        }
        drop(store);
        let pre = linker.instantiate_pre(module)?;
        let spawns = module.imports().any(|import| (import.module(), import.name()) == SPAWN);
        if spawns {
            match module.get_export(START) {
                Some(ExternType::Func(_)) => {}
                _ => bail!("the module makes threads and has no function {START}"),
            }
        }
        // Set once, just here.
        let _ = threads.pre.set(pre.clone());
        Ok((pre, threads))
    }

    fn store(self: &Arc<Self>, engine: &wasmtime::Engine) -> wasmtime::Result<Store<Module>> {
        let wasi = self.world.context()?.build_p1();
        let state = Module::new(wasi, Some(self.clone()));
        let mut store = Store::new(engine, state);
        store.limiter(|state| &mut state.limits);
        self.bounds.hold(&mut store)?;
        Ok(store)
    }

    /// A new thread, by its number.
    fn spawn(self: Arc<Self>, argument: i32) -> Option<i32> {
        let counted = self.running.fetch_update(Ordering::AcqRel, Ordering::Acquire, |running| {
            (running < self.max).then_some(running + 1)
        });
        counted.ok()?;
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let run = self.clone();
        let made = if id > MAX_ID {
            None
        } else {
            let name = format!("wasm-{id}");
            std::thread::Builder::new().name(name).spawn(move || run.run(id, argument)).ok()
        };
        if made.is_none() {
            self.running.fetch_sub(1, Ordering::AcqRel);
            return None;
        }
        Some(id)
    }

    fn run(self: Arc<Self>, id: i32, argument: i32) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let result = match runtime {
            Ok(runtime) => runtime.block_on(self.call(id, argument)),
            Err(error) => Err(error.into()),
        };
        self.running.fetch_sub(1, Ordering::AcqRel);
        // A thread that exits, or that traps, ends them all.
        if let Err(error) = result {
            container::exit(code_of(&error));
        }
    }

    async fn call(self: &Arc<Self>, id: i32, argument: i32) -> wasmtime::Result<()> {
        let pre = self.pre.get();
        let pre = pre.ok_or_else(|| wasmtime::format_err!("the module is not linked"))?;
        let mut store = self.store(pre.module().engine())?;
        let instance = pre.instantiate_async(&mut store).await?;
        let start = instance.get_typed_func::<(i32, i32), ()>(&mut store, START)?;
        start.call_async(&mut store, (id, argument)).await
    }
}
