//! What a daemon may ask for, operation by operation.

use sandbox_parent::protocol::{
    CAPABILITIES, Fixed, MAX_MESSAGE, MAX_NAME, Reader, VERSION, Writer, ns, op, stage,
};

use super::control::Parent;
use super::namespaces::{self, Made};
use super::spawn::{self, Failure, at};
use super::store::pending;
use super::sys::{self, Fd, Passed};

const BAD: Failure = (libc::EINVAL, stage::REQUEST);
const FULL: Failure = (libc::ENOSPC, stage::FULL);

fn name<'a>(m: &mut Reader<'a>) -> Result<&'a [u8], Failure> {
    m.str().filter(|s| !s.is_empty() && s.len() <= MAX_NAME).map(str::as_bytes).ok_or(BAD)
}

impl Parent {
    /// Does what a message asks for, and writes the fields of the reply.
    pub fn perform(
        &mut self,
        control: usize,
        code: u8,
        mut m: Reader<'_>,
        mut fds: Passed,
        w: &mut Writer<Fixed<'_>>,
    ) -> Result<(), Failure> {
        w.u32(0).u8(0);
        let looks = matches!(
            code,
            op::HELLO | op::STATUS | op::LIST_KEPT | op::LIST_WATCHED | op::LIST_PODS
        );
        if !looks && !self.is_daemon(control) {
            return Err((libc::EPERM, stage::REQUEST));
        }
        if fds.cut {
            return Err((libc::EMFILE, stage::FDS));
        }
        let m = &mut m;
        match code {
            op::HELLO => {
                self.take_over(control);
                w.u32(VERSION).u32(std::process::id()).u8(u8::from(self.idle())).u32(CAPABILITIES);
            }
            op::SPAWN => self.spawn(m, &fds, w)?,
            op::NAMESPACES => self.namespaces(m, &fds, w)?,
            op::WATCH => {
                let (cookie, pid) = (m.u64().ok_or(BAD)?, m.u32().ok_or(BAD)?);
                let since = m.u64().ok_or(BAD)?;
                let pid = i32::try_from(pid).ok().filter(|p| *p > 0).ok_or(BAD)?;
                self.reaper.reap();
                let (row, pidfd) =
                    self.reaper.watch(cookie, pid, since).map_err(at(stage::FULL))?;
                self.follow(row, pidfd);
            }
            op::ACK => self.reaper.forget(m.u64().ok_or(BAD)?),
            op::KEEP => {
                let name = name(m)?;
                let fd = fds.take(0).ok_or(BAD)?;
                self.store.keep(name, fd).map_err(|mut fd| {
                    fd.close();
                    FULL
                })?;
            }
            op::FETCH => {
                let fd = self.store.fetch(name(m)?).ok_or((libc::ENOENT, stage::REQUEST))?;
                self.outgoing.borrowed = true;
                self.outgoing.push(fd);
            }
            op::FORGET => self.store.forget(name(m)?),
            op::LIST_KEPT => {
                let from = m.u32().ok_or(BAD)? as usize;
                list(w, self.store.names(from));
            }
            op::LIST_PODS => {
                let from = m.u32().ok_or(BAD)? as usize;
                let pods = self.store.pods().skip_while(|i| *i < from);
                list(w, pods.map(|i| (i, self.store.pod_name(i), &[][..])));
            }
            op::LISTEN => {
                let name = name(m)?;
                let fd = fds.get(0).ok_or(BAD)?;
                let pod = self.store.add_pod(name).ok_or(FULL)?;
                self.listen(pod, fd);
                let _ = fds.take(0);
            }
            op::UNLISTEN => {
                let name = name(m)?;
                let drain = m.u8() == Some(1);
                if let Some(pod) = self.store.find_pod(name) {
                    self.unlisten(pod, drain);
                }
            }
            op::READY => {
                self.ready = true;
                self.offer = true;
            }
            op::STATUS => {
                let parked: usize = self
                    .connections
                    .iter()
                    .map(|(_, c)| c.count(&self.store, pending::PARKED))
                    .sum();
                w.u32(self.store.kept() as u32)
                    .u32(self.reaper.watched.len() as u32)
                    .u32(self.store.pods().count() as u32)
                    .u32(self.connections.len() as u32)
                    .u32(parked as u32)
                    .u64(self.refused);
            }
            op::SHUTDOWN => {
                if m.u8().ok_or(BAD)? == 0 && !self.idle() {
                    return Err((libc::EBUSY, stage::REQUEST));
                }
                self.end_listening();
                self.done = true;
            }
            op::LIST_WATCHED => {
                let from = m.u32().unwrap_or(0) as usize;
                let room = 4000;
                let rows = || self.reaper.watched.iter().skip_while(|(i, _)| *i < from);
                w.u16(rows().take(room).count() as u16);
                for (_, row) in rows().take(room) {
                    w.u64(row.cookie);
                }
                w.u32(rows().nth(room).map_or(0, |(i, _)| i as u32));
            }
            _ => return Err((libc::ENOSYS, stage::REQUEST)),
        }
        Ok(())
    }

    fn spawn(
        &mut self,
        m: &mut Reader<'_>,
        fds: &Passed,
        w: &mut Writer<Fixed<'_>>,
    ) -> Result<(), Failure> {
        let cookie = m.u64().ok_or(BAD)?;
        if !self.reaper.has_room(self.limits.watched) {
            return Err(FULL);
        }
        // Before the program: what it leaves behind ends later than this.
        let since = self.reaper.next;
        let pid = spawn::spawn(*m, fds, &self.nofile)?;
        self.reaper.adopt(cookie, pid);
        // It cannot have been reaped yet, so its pid is still its own.
        match sys::pidfd_open(pid) {
            Ok(pidfd) => self.outgoing.push(pidfd),
            Err(e) => {
                // SAFETY: a child of ours; nobody could follow it.
                unsafe { libc::kill(pid, libc::SIGKILL) };
                self.reaper.forget(cookie);
                return Err((e, stage::FORK));
            }
        }
        w.u32(pid as u32).u64(since);
        Ok(())
    }

    fn namespaces(
        &mut self,
        m: &mut Reader<'_>,
        fds: &Passed,
        w: &mut Writer<Fixed<'_>>,
    ) -> Result<(), Failure> {
        let since = self.reaper.next;
        let mut look = *m;
        let (flags, id) = (look.u8().ok_or(BAD)?, look.str().ok_or(BAD)?);
        let made = namespaces::make(m, fds)?;
        made.fds.iter().filter(|f| f.is_some()).for_each(|f| self.outgoing.push(*f));
        let mut init = Fd::NONE;
        if made.init > 0 {
            init = sys::pidfd_open(made.init).map_err(at(stage::OPEN))?;
            self.outgoing.push(init);
        }
        w.u32(made.init as u32).u64(since);
        if flags & ns::KEEP != 0 {
            if let Err(failure) = self.keep_namespaces(id, &made, init) {
                let mut name = Name::default();
                if let Some(all) = name.of(id, b"") {
                    self.store.forget(all);
                }
                if init.is_some() {
                    // Nobody else knows of it.
                    let _ = sys::pidfd_kill(init);
                }
                return Err(failure);
            }
            w.u8(1);
        }
        Ok(())
    }

    /// Keeps what was made as `<id>/ns/…`, beside what the daemon gets.
    fn keep_namespaces(&mut self, id: &str, made: &Made, init: Fd) -> Result<(), Failure> {
        let pid = match made.init {
            0 => Fd::NONE,
            init => namespaces::open_ns(init, b"pid").map_err(at(stage::OPEN))?,
        };
        let [ipc, uts, user] = made.fds;
        // The PID namespace is not passed on: the descriptor itself is kept.
        let kept = [(ipc, &b"ipc"[..]), (uts, b"uts"), (user, b"user"), (init, b"init")];
        let mut outcome =
            kept.into_iter().filter(|(fd, _)| fd.is_some()).try_for_each(|(fd, what)| {
                let fd = sys::duplicate(fd).map_err(at(stage::FDS))?;
                self.keep_one(id, what, fd)
            });
        if pid.is_some() {
            outcome = self.keep_one(id, b"pid", pid).and(outcome);
        }
        outcome
    }

    fn keep_one(&mut self, id: &str, what: &[u8], fd: Fd) -> Result<(), Failure> {
        let mut name = Name::default();
        let kept = match name.of(id, what) {
            Some(name) => self.store.keep(name, fd).map_err(|fd| (fd, FULL)),
            None => Err((fd, BAD)),
        };
        kept.map_err(|(mut fd, failure)| {
            fd.close();
            failure
        })
    }
}

/// Room for a name, without allocating.
struct Name([u8; MAX_NAME]);

impl Default for Name {
    fn default() -> Self {
        Self([0; MAX_NAME])
    }
}

impl Name {
    /// `<id>/ns/<what>`; `None` when it is too long or there is no id.
    fn of(&mut self, id: &str, what: &[u8]) -> Option<&[u8]> {
        let parts = [id.as_bytes(), b"/ns/", what];
        let len = parts.iter().map(|part| part.len()).sum::<usize>();
        let room = self.0.get_mut(..len).filter(|_| !id.is_empty())?;
        room.iter_mut().zip(parts.into_iter().flatten()).for_each(|(to, from)| *to = *from);
        Some(room)
    }
}

/// Writes `next:u32, n:u16, name…` as far as there is room.
fn list<'a>(w: &mut Writer<Fixed<'_>>, names: impl Iterator<Item = (usize, &'a [u8], &'a [u8])>) {
    let at = w.len();
    w.u32(0).u16(0);
    let mut n = 0u16;
    for (row, first, rest) in names {
        if w.len() + first.len() + rest.len() > MAX_MESSAGE / 2 {
            w.patch(at, &(row as u32).to_le_bytes());
            break;
        }
        w.parts(first, rest);
        n += 1;
    }
    w.patch(at + 4, &n.to_le_bytes());
}
