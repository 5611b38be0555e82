//! Named points on a worker's way at which a test may kill, stop or delay the process; `tests/chaos` does. Without the
//! feature `chaos` they are nothing at all.
//!
//! With it, a process that is given a socket says there which point it has reached, and goes on when it is answered. What
//! happens meanwhile is up to whoever listens: a process that is killed never hears the answer.

use uuid::Uuid;

/// This process is at `point`, with this job.
#[cfg(not(feature = "chaos"))]
#[inline(always)]
pub fn reach(_point: &str, _job_id: Uuid) {}

#[cfg(feature = "chaos")]
pub fn reach(point: &str, job_id: Uuid) {
    ask(point, Some(job_id));
}

/// As [`reach`], for what there is to choose: the answer's text, empty where nobody listens.
#[cfg(feature = "chaos")]
pub fn ask(point: &str, job_id: Option<Uuid>) -> String {
    use std::io::{self, Read, Write};
    use std::os::unix::net::UnixStream;

    /// Path of the socket.
    const VARIABLE: &str = "PROMPTWEAVE_FAILPOINTS";

    let Some(path) = std::env::var_os(VARIABLE) else {
        return String::new();
    };
    let asked = || -> io::Result<String> {
        let mut stream = UnixStream::connect(path)?;
        let job = job_id.map(|id| id.to_string()).unwrap_or_default();
        let line = format!("{} {point} {job}\n", std::process::id());
        stream.write_all(line.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    // Whoever listened is gone, and so is the test.
    asked().unwrap_or_default()
}
