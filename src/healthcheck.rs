//! `promptweave healthcheck`: asks a server whether it is ready, for container images without curl.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::Context;

const TIMEOUT: Duration = Duration::from_secs(5);

/// Ok if `GET path` is answered with a 2xx status within five seconds.
pub fn check(address: SocketAddr, path: &str) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)
        .with_context(|| format!("cannot reach {address}"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // With HTTP/1.0 the server closes after the answer. Only the status line is read.
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut status = String::new();
    BufReader::new(stream)
        .read_line(&mut status)
        .with_context(|| format!("{address} did not answer within {} s", TIMEOUT.as_secs()))?;
    let code = status.split(' ').nth(1).unwrap_or_default();
    anyhow::ensure!(
        status.starts_with("HTTP/") && code.starts_with('2'),
        "http://{address}{path} answered `{}`",
        status.trim_end()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;

    fn answered(answer: &'static str) -> anyhow::Result<()> {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
            stream.write_all(answer.as_bytes()).unwrap();
        });
        use std::io::Write;
        let outcome = super::check(address, "/readyz");
        thread.join().unwrap();
        outcome
    }

    #[test]
    fn only_a_2xx_answer_is_healthy() {
        answered("HTTP/1.0 200 OK\r\n\r\n{}").unwrap();
        let error = answered("HTTP/1.0 503 Service Unavailable\r\n\r\n").unwrap_err();
        assert!(error.to_string().contains("503"), "{error}");
        assert!(answered("SSH-2.0-OpenSSH\r\n").is_err());
    }
}
