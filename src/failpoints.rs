//! Named points in a worker's code at which a test (`tests/chaos`) may kill, stop or delay the process. Without the
//! feature `chaos`, they compile to nothing.
//!
//! With the feature, a process that is given a socket reports there which point it has reached, and continues when it
//! gets an answer. The listener decides what happens meanwhile: a process that is killed never gets the answer.

use uuid::Uuid;

/// Reports that this process is at `point`, with this job.
#[cfg(not(feature = "chaos"))]
#[inline(always)]
pub fn reach(_point: &str, _job_id: Uuid) {}

#[cfg(feature = "chaos")]
pub fn reach(point: &str, job_id: Uuid) {
    ask(point, Some(job_id));
}

/// Like [`reach`], for points with a choice: returns the answer's text, which is empty if nobody listens.
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
    // If the listener is gone, the test is over.
    asked().unwrap_or_default()
}
