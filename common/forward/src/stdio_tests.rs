use super::*;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A FIFO as the engine makes it: reader, writer.
fn fifo() -> (tempfile::TempDir, std::fs::File, OwnedFd) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let mut options = std::fs::OpenOptions::new();
    let reader = options.read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    let writer = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    (dir, reader, writer.into())
}

fn noise(n: usize) -> Vec<u8> {
    let mut x = 0x2545_f491_u32;
    (0..n)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            x as u8
        })
        .collect()
}

fn write_all(mut to: UnixStream, bytes: Vec<u8>) -> std::thread::JoinHandle<UnixStream> {
    std::thread::spawn(move || {
        to.write_all(&bytes).unwrap();
        to
    })
}

fn read_all(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        from.read_to_end(&mut all).unwrap();
        all
    })
}

async fn joined<T: Send + 'static>(thread: std::thread::JoinHandle<T>) -> T {
    let wait = tokio::task::spawn_blocking(move || thread.join().unwrap());
    tokio::time::timeout(Duration::from_secs(30), wait).await.expect("not in time").unwrap()
}

#[tokio::test]
async fn output_arrives_whole_and_ends_with_the_guests_shutdown() {
    let (_dir, reader, writer) = fifo();
    let (ours, guest) = UnixStream::pair().unwrap();
    let bytes = noise(3 << 20);
    let read = read_all(reader);
    let sent = write_all(guest, bytes.clone());
    let pump = tokio::spawn(Pump::new(ours.into(), writer, Direction::Output).unwrap().run());
    let guest = joined(sent).await;
    guest.shutdown(std::net::Shutdown::Write).unwrap();
    pump.await.unwrap();
    assert_eq!(joined(read).await, bytes);
}

#[tokio::test]
async fn input_ends_with_the_last_writer_and_the_other_direction_stays() {
    let (_dir, reader, writer) = fifo();
    let (ours, mut guest) = UnixStream::pair().unwrap();
    let mut back = ours.try_clone().unwrap();
    let pump = tokio::spawn(Pump::new(ours.into(), reader.into(), Direction::Input).unwrap().run());
    let mut writer = std::fs::File::from(writer);
    writer.write_all(b"hello").unwrap();
    drop(writer);
    pump.await.unwrap();
    let mut all = Vec::new();
    guest.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"hello");
    guest.write_all(b"answer").unwrap();
    let mut answer = [0; 6];
    back.set_nonblocking(false).unwrap();
    back.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
}

/// The descriptors live on where sandbox-parent keeps them; the pump is what dies.
async fn cut_and_taken_up(direction: Direction) {
    let (_dir, reader, writer) = fifo();
    let (ours, guest) = UnixStream::pair().unwrap();
    let bytes = noise(4 << 20);
    let mut writer = Some(writer);
    let (kept_guest, kept_engine): (OwnedFd, OwnedFd) = match direction {
        Direction::Output => (ours.into(), writer.take().unwrap()),
        Direction::Input => (ours.into(), reader.try_clone().unwrap().into()),
    };
    // The end is held back until it was cut often enough: how fast the rest goes is not ours to say.
    let (end, held) = std::sync::mpsc::channel::<()>();
    let send = |bytes: &[u8], to: &mut dyn Write, held: std::sync::mpsc::Receiver<()>| {
        let (most, rest) = bytes.split_at(bytes.len() - (64 << 10));
        to.write_all(most).unwrap();
        held.recv().unwrap();
        to.write_all(rest).unwrap();
    };
    let (read, sent);
    match direction {
        Direction::Output => {
            read = read_all(reader);
            let bytes = bytes.clone();
            sent = std::thread::spawn(move || {
                let mut guest = guest;
                send(&bytes, &mut guest, held);
            });
        }
        Direction::Input => {
            drop(reader);
            read = read_all(guest);
            let bytes = bytes.clone();
            let mut writer = std::fs::File::from(writer.unwrap());
            sent = std::thread::spawn(move || send(&bytes, &mut writer, held));
        }
    }
    let mut cuts = 0;
    let mut micros = 1_u64;
    loop {
        let pump =
            Pump::new(kept_guest.try_clone().unwrap(), kept_engine.try_clone().unwrap(), direction);
        let mut task = tokio::spawn(pump.unwrap().run());
        // Every time cut a little later.
        micros = micros * 3 / 2 + 1;
        match tokio::time::timeout(Duration::from_micros(micros), &mut task).await {
            Ok(done) => {
                done.unwrap();
                break;
            }
            Err(_) => {
                task.abort();
                let _ = task.await;
                cuts += 1;
                if cuts == 4 {
                    end.send(()).unwrap();
                }
            }
        }
        assert!(cuts < 60, "it does not come to an end");
    }
    assert!(cuts > 3, "it was cut {cuts} times only");
    drop((kept_guest, kept_engine));
    joined(sent).await;
    let all = joined(read).await;
    assert_eq!(all.len(), bytes.len());
    assert!(all == bytes, "bytes differ");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_output_that_is_cut_anywhere_is_taken_up_byte_by_byte() {
    cut_and_taken_up(Direction::Output).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_input_that_is_cut_anywhere_is_taken_up_byte_by_byte() {
    let work = cut_and_taken_up(Direction::Input);
    tokio::time::timeout(Duration::from_secs(60), work).await.unwrap();
}

#[tokio::test]
async fn output_that_nobody_reads_does_not_hold_the_guest_up() {
    let (_dir, reader, writer) = fifo();
    let (ours, guest) = UnixStream::pair().unwrap();
    drop(reader);
    let pump = tokio::spawn(Pump::new(ours.into(), writer, Direction::Output).unwrap().run());
    let guest = joined(write_all(guest, noise(2 << 20))).await;
    drop(guest);
    tokio::time::timeout(Duration::from_secs(10), pump).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_file_takes_output_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let file = std::fs::OpenOptions::new().append(true).create(true).open(&path).unwrap();
    let (ours, guest) = UnixStream::pair().unwrap();
    let pump = tokio::spawn(Pump::new(ours.into(), file.into(), Direction::Output).unwrap().run());
    let bytes = noise(100_000);
    drop(joined(write_all(guest, bytes.clone())).await);
    pump.await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), bytes);
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
    let (ours, guest) = UnixStream::pair().unwrap();
    let pump = tokio::spawn(Pump::new(ours.into(), null.into(), Direction::Output).unwrap().run());
    drop(joined(write_all(guest, bytes)).await);
    pump.await.unwrap();
}

/// A [`Keeper`] in memory, as sandbox-parent is one in another process.
#[derive(Default)]
struct Kept(std::sync::Mutex<std::collections::BTreeMap<String, OwnedFd>>);

#[async_trait::async_trait]
impl Keeper for Kept {
    async fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
        self.0.lock().unwrap().insert(name.into(), fd.try_clone_to_owned().unwrap());
        Ok(())
    }
    async fn fetch(&self, name: &str) -> Result<Option<OwnedFd>> {
        Ok(self.0.lock().unwrap().get(name).map(|fd| fd.try_clone().unwrap()))
    }
    async fn forget(&self, prefix: &str) -> Result<()> {
        self.0.lock().unwrap().retain(|name, _| !name.starts_with(prefix));
        Ok(())
    }
}

#[tokio::test]
async fn a_stream_is_kept_until_its_end_and_found_again() {
    let kept = Arc::new(Kept::default());
    let keeper: Arc<dyn Keeper> = kept.clone();
    let (_dir, reader, writer) = fifo();
    let (ours, mut guest) = UnixStream::pair().unwrap();
    let name = name("c", "", "stdout");
    let pump = begin(&keeper, name.clone(), ours.into(), writer, Direction::Output).await.unwrap();
    guest.write_all(b"one ").unwrap();
    tokio::task::yield_now().await;
    pump.pump.abort();
    let _ = pump.pump.await;
    assert_eq!(
        kept.0.lock().unwrap().keys().collect::<Vec<_>>(),
        ["vmio/c//stdout/engine", "vmio/c//stdout/guest"]
    );
    let pump = resume(&keeper, name.clone(), Direction::Output).await.unwrap().unwrap();
    guest.write_all(b"two").unwrap();
    drop(guest);
    pump.pump.await.unwrap();
    // Nothing keeps the FIFO open any more.
    assert_eq!(joined(read_all(reader)).await, b"one two");
    assert!(kept.0.lock().unwrap().is_empty());
    assert!(resume(&keeper, name, Direction::Output).await.unwrap().is_none());
}

#[tokio::test]
async fn an_output_whose_end_does_not_show_is_brought_to_it_with_every_byte() {
    let keeper: Arc<dyn Keeper> = Arc::new(Kept::default());
    let (_dir, reader, writer) = fifo();
    let (ours, guest) = UnixStream::pair().unwrap();
    let name = name("c", "", "stdout");
    let stream = begin(&keeper, name, ours.into(), writer, Direction::Output).await.unwrap();
    let bytes = noise(1 << 20);
    let read = read_all(reader);
    // A guest whose half-close does not come through hangs up when it sees that we have.
    let mut guest = joined(write_all(guest, bytes.clone())).await;
    let hangs_up = std::thread::spawn(move || {
        let mut rest = Vec::new();
        guest.read_to_end(&mut rest).unwrap();
    });
    stream.finish(Duration::from_secs(20)).await;
    joined(hangs_up).await;
    assert!(joined(read).await == bytes);
}
