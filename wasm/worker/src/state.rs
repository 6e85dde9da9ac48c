//! What the host's functions find of their instance.

use std::sync::Arc;

use wasm_process::memory;
use wasmtime::{Engine, ResourceLimiter, Store};
use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::{FsPerms, ResourceTable, WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};
use wasmtime_wasi_http::{
    Error, RequestOptions, WasiBody, WasiHttpCtx, WasiHttpCtxView, WasiHttpHooks, WasiHttpView,
};

use crate::threads::Threads;
use crate::workload::Bounds;

/// Of a core module.
pub struct Module {
    /// WASI preview 1.
    pub wasi: WasiP1Ctx,
    /// Bounds of its memory.
    pub limits: Limits,
    /// Makes its threads, where it has any.
    pub threads: Option<Arc<Threads>>,
    /// WASI-NN.
    #[cfg(feature = "wasi-nn")]
    pub nn: wasmtime_wasi_nn::witx::WasiNnCtx,
}

impl Module {
    /// With this context, and what makes its threads.
    pub fn new(wasi: WasiP1Ctx, threads: Option<Arc<Threads>>) -> Self {
        Self {
            wasi,
            limits: Limits,
            threads,
            #[cfg(feature = "wasi-nn")]
            nn: crate::nn::of_module(),
        }
    }
}

/// Of a component.
pub struct Component {
    /// WASI 0.2.
    pub wasi: WasiCtx,
    /// `wasi:http`.
    pub http: WasiHttpCtx,
    /// What it does with requests that go out.
    pub hooks: NoRequests,
    /// Its handles.
    pub table: ResourceTable,
    /// WASI-NN.
    #[cfg(feature = "wasi-nn")]
    pub nn: wasmtime_wasi_nn::wit::WasiNnCtx,
    /// Bounds of its memory.
    pub limits: Limits,
}

/// Requests of components to others (`wasi:http/outgoing-handler`) are denied: a TLS stack and its
/// roots would be in every container. Sockets of `wasi:sockets` go out as they like.
#[derive(Debug, Clone, Copy)]
pub struct NoRequests;

type Sent = Box<dyn Future<Output = Result<(), Error>> + Send>;
type Answered = Box<dyn Future<Output = Result<(http::Response<WasiBody>, Sent), Error>> + Send>;

impl WasiHttpHooks for NoRequests {
    fn send_request(
        &mut self,
        _request: http::Request<WasiBody>,
        _options: Option<RequestOptions>,
        _sent: Sent,
    ) -> Answered {
        Box::new(std::future::ready(Err(Error::HttpRequestDenied)))
    }
}

impl WasiView for Component {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl WasiHttpView for Component {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView { ctx: &mut self.http, table: &mut self.table, hooks: &mut self.hooks }
    }
}

impl Component {
    /// With this context.
    pub fn new(wasi: WasiCtx) -> Self {
        Self {
            wasi,
            http: WasiHttpCtx::new(),
            hooks: NoRequests,
            table: ResourceTable::new(),
            #[cfg(feature = "wasi-nn")]
            nn: crate::nn::of_component(),
            limits: Limits,
        }
    }

    /// A store with a component's state, held by `bounds`.
    ///
    /// # Errors
    /// When the world cannot be shown, or the store not be held.
    pub fn store(engine: &Engine, world: &World, bounds: Bounds) -> wasmtime::Result<Store<Self>> {
        let mut store = Store::new(engine, Self::new(world.context()?.build()));
        store.limiter(|state| &mut state.limits);
        bounds.hold(&mut store)?;
        Ok(store)
    }
}

/// Holds linear memories to the container's limit, as it is when they grow. Growing beyond it answers -1 to the
/// program, as WebAssembly has it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits;

impl ResourceLimiter for Limits {
    fn memory_growing(
        &mut self,
        _current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        Ok(memory::fits(desired))
    }

    fn table_growing(
        &mut self,
        _current: usize,
        _desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        Ok(true)
    }
}

/// What WASI shows of the container: it is in it already, so that everything that can be seen is
/// the container's.
#[derive(Debug, Clone)]
pub struct World {
    /// Arguments.
    pub args: Vec<String>,
    /// Environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: String,
}

impl World {
    /// The context of one instance.
    ///
    /// # Errors
    /// When a directory cannot be opened.
    pub fn context(&self) -> wasmtime::Result<WasiCtxBuilder> {
        let mut builder = WasiCtxBuilder::new();
        builder
            .args(&self.args)
            .envs(&self.env)
            .inherit_stdio()
            .inherit_network()
            .allow_tcp(true)
            .allow_udp(true)
            .allow_ip_name_lookup(true)
            // The process is this container's alone, and has one thread for it.
            .allow_blocking_current_thread(true);
        // Mounts are below, with what they allow: the kernel sees to it.
        builder.preopened_dir("/", "/", FsPerms::ReadWrite)?;
        if self.cwd != "/" {
            builder.initial_cwd(&self.cwd);
            // Programs of wasi-libc look names without a slash up in a directory named so.
            builder.preopened_dir(&self.cwd, ".", FsPerms::ReadWrite)?;
        }
        Ok(builder)
    }
}
