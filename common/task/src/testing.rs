//! A runtime that can do nothing: for tests of what is around a Task server.

use std::os::fd::OwnedFd;
use std::path::Path;

use async_trait::async_trait;
use futures::future::BoxFuture;

use crate::error::{Error, Result};
use crate::runtime::{
    AnyMessage, CreateContainer, Exit, ProcessIo, ProcessRef, Runtime, Spawned, StatsFlavor,
};

/// Refuses everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nothing;

fn no<T>() -> Result<T> {
    Err(Error::Unimplemented("nothing".into()))
}

#[async_trait]
impl Runtime for Nothing {
    async fn create(&self, _: &CreateContainer, _: ProcessIo) -> Result<Spawned> {
        no()
    }
    async fn start(&self, _: &str, _: u32) -> Result<()> {
        no()
    }
    async fn exec(&self, _: &str, _: &str, _: &[u8], _: ProcessIo) -> Result<Spawned> {
        no()
    }
    async fn kill(&self, _: &ProcessRef, _: i32, _: bool) -> Result<()> {
        no()
    }
    async fn delete(&self, _: &str, _: &Path) -> Result<()> {
        no()
    }
    async fn pids(&self, _: &str) -> Result<Vec<u32>> {
        no()
    }
    async fn pause(&self, _: &str) -> Result<()> {
        no()
    }
    async fn resume(&self, _: &str) -> Result<()> {
        no()
    }
    async fn checkpoint(&self, _: &str, _: &Path, _: Option<AnyMessage>) -> Result<()> {
        no()
    }
    async fn update(&self, _: &str, _: &[u8]) -> Result<()> {
        no()
    }
    async fn stats(&self, _: &str, _: StatsFlavor) -> Result<AnyMessage> {
        no()
    }
    async fn oom_watch(&self, _: &str) -> Option<OwnedFd> {
        None
    }
    fn oom_kills(&self, _: &str) -> u64 {
        0
    }
    async fn reattach(&self, _: &ProcessRef) -> Result<Option<BoxFuture<'static, Exit>>> {
        no()
    }
    async fn existing(&self) -> Vec<String> {
        Vec::new()
    }
    async fn exit_recorded(&self, _: &ProcessRef) {}
}
