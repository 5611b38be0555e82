//! The addresses that may be connected to: public ones, and those that the operator opened.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(a: u16, b: u16, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, 0), prefix)
}

/// IANA's special-purpose registry (RFC 6890 and its successors), without its public blocks.
const NOT_PUBLIC_V4: [Ipv4Net; 15] = [
    v4(0, 0, 0, 0, 8),       // this network
    v4(10, 0, 0, 0, 8),      // private
    v4(100, 64, 0, 0, 10),   // carrier-grade NAT
    v4(127, 0, 0, 0, 8),     // loopback
    v4(169, 254, 0, 0, 16),  // link-local, where clouds keep their metadata
    v4(172, 16, 0, 0, 12),   // private
    v4(192, 0, 0, 0, 24),    // protocol assignments
    v4(192, 0, 2, 0, 24),    // documentation
    v4(192, 88, 99, 0, 24),  // 6to4 relays
    v4(192, 168, 0, 0, 16),  // private
    v4(198, 18, 0, 0, 15),   // benchmarks
    v4(198, 51, 100, 0, 24), // documentation
    v4(203, 0, 113, 0, 24),  // documentation
    v4(224, 0, 0, 0, 4),     // multicast
    v4(240, 0, 0, 0, 4),     // reserved, broadcast
];

/// The one block of IPv6 with public addresses. Loopback, unique local, link-local and multicast addresses lie outside
/// it, and so do those that embed an IPv4 address (mapped, NAT64).
const GLOBAL_UNICAST_V6: Ipv6Net = v6(0x2000, 0, 3);
const NOT_PUBLIC_V6: [Ipv6Net; 4] = [
    v6(0x2001, 0, 23),     // protocol assignments, with Teredo
    v6(0x2001, 0xdb8, 32), // documentation
    v6(0x2002, 0, 16),     // 6to4: embeds an address of IPv4
    v6(0x3fff, 0, 20),     // documentation
];

/// Whether an address is reachable on the public internet.
pub fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !NOT_PUBLIC_V4.iter().any(|net| net.contains(&address)),
        IpAddr::V6(address) => {
            GLOBAL_UNICAST_V6.contains(&address)
                && !NOT_PUBLIC_V6.iter().any(|net| net.contains(&address))
        }
    }
}

/// A destination that the operator opens: `10.1.0.0/16`, `minio.internal:9000`, `[fd00::1]:9000`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opening {
    /// Every port of these addresses, whatever the host's name.
    Addresses(IpNet),
    /// One port of a host as it is written in a URL, whatever it resolves to.
    Host(Host, u16),
}

impl fmt::Display for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addresses(net) => net.fmt(f),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is neither addresses (`10.1.0.0/16`) nor a host with its port (`minio.internal:9000`)"
)]
pub struct InvalidOpening(String);

impl FromStr for Opening {
    type Err = InvalidOpening;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(net) = text.parse::<IpNet>() {
            return Ok(Self::Addresses(net));
        }
        let host_and_port = text.rsplit_once(':').and_then(|(host, port)| {
            let port = port.parse().ok().filter(|port| *port > 0)?;
            Some(Self::Host(Host::parse(host).ok()?, port))
        });
        host_and_port.ok_or_else(|| InvalidOpening(text.to_owned()))
    }
}

/// The destinations that connections may have.
#[derive(Clone, Debug, Default)]
pub struct Network {
    addresses: Vec<IpNet>,
    hosts: BTreeSet<(Host, u16)>,
}

impl FromIterator<Opening> for Network {
    fn from_iter<I: IntoIterator<Item = Opening>>(openings: I) -> Self {
        let mut network = Self::default();
        for opening in openings {
            match opening {
                Opening::Addresses(net) => network.addresses.push(net),
                Opening::Host(host, port) => {
                    network.hosts.insert((host, port));
                }
            }
        }
        network
    }
}

/// The decision about a URL before it is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The operator opened this host and port, or this address.
    Open,
    /// It is a name, whose addresses must be checked, or a public address.
    Check,
    Refused,
}

impl Network {
    pub fn verdict(&self, url: &Url) -> Verdict {
        let (Some(host), Some(port)) = (url.host(), url.port_or_known_default()) else {
            return Verdict::Refused;
        };
        let address: IpAddr = match host {
            _ if self.hosts.contains(&(host.to_owned(), port)) => return Verdict::Open,
            Host::Domain(_) => return Verdict::Check,
            Host::Ipv4(address) => address.into(),
            Host::Ipv6(address) => address.into(),
        };
        if self.opened(address) {
            Verdict::Open
        } else if is_public(address) {
            Verdict::Check
        } else {
            Verdict::Refused
        }
    }

    fn opened(&self, address: IpAddr) -> bool {
        self.addresses.iter().any(|net| net.contains(&address))
    }

    fn admits(&self, address: IpAddr) -> bool {
        self.opened(address) || is_public(address)
    }
}

/// The error shows no address: a client could use it to map the network behind this service.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` has no public address")]
pub struct NotPublic(pub String);

/// A resolver that returns only addresses that may be connected to.
pub(super) struct Guarded {
    pub network: Arc<Network>,
    pub names: Arc<dyn Resolve>,
}

impl Resolve for Guarded {
    fn resolve(&self, name: Name) -> Resolving {
        let (network, host) = (self.network.clone(), name.as_str().to_owned());
        let resolving = self.names.resolve(name);
        Box::pin(async move {
            let (admitted, refused): (Vec<_>, Vec<_>) =
                resolving.await?.partition(|at| network.admits(at.ip()));
            if admitted.is_empty() {
                tracing::warn!(host, addresses = ?refused, "a connection was refused");
                return Err(NotPublic(host).into());
            }
            Ok(Box::new(admitted.into_iter()) as Addrs)
        })
    }
}

/// The machine's own resolver.
pub(super) struct SystemNames;

impl Resolve for SystemNames {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let found: Vec<SocketAddr> = found.collect();
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_addresses_are_told_from_all_others() {
        let public = [
            "1.1.1.1",
            "8.8.8.8",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "169.253.255.255",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "192.88.98.0",
            "192.167.255.255",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "2600::1",
            "2001:200::1",
            "2001:4860:4860::8888",
            "2003::1",
            "2a00:1450::1",
            "3ffe::1",
        ];
        let others = [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "10.255.255.255",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.0.192",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::7f00:1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "64:ff9b::127.0.0.1",
            "64:ff9b::8.8.8.8",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:10::1",
            "2001:20::1",
            "2001:db8::1",
            "2002:7f00:1::1",
            "2002:808:808::1",
            "3fff::1",
            "5f00::1",
            "4000::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ];
        for address in public {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
        for address in others {
            assert!(!is_public(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn an_opening_is_addresses_or_a_host_with_its_port() {
        for text in ["10.0.0.0/8", "fd00::/8", "127.0.0.1/32", "::1/128"] {
            assert!(matches!(text.parse(), Ok(Opening::Addresses(_))), "{text}");
            assert_eq!(text.parse::<Opening>().unwrap().to_string(), text);
        }
        for text in [
            "minio.internal:9000",
            "127.0.0.1:80",
            "[::1]:443",
            "LOCALHOST:1",
        ] {
            assert!(matches!(text.parse(), Ok(Opening::Host(..))), "{text}");
        }
        for text in [
            "",
            "10.0.0.1",
            "minio",
            "minio:",
            "minio:0",
            "a b:1",
            "10.0.0.0/33",
            ":80",
        ] {
            let error = text.parse::<Opening>().unwrap_err();
            assert!(error.to_string().contains("minio.internal:9000"), "{text}");
        }
    }

    #[test]
    fn an_address_in_a_url_is_checked_however_it_is_written() {
        let network: Network = ["10.1.0.0/16", "127.0.0.1:9000", "Minio:9000", "[::1]:9000"]
            .map(|opening| opening.parse().unwrap())
            .into_iter()
            .collect();
        let verdict = |url: &str| network.verdict(&Url::parse(url).unwrap());
        for url in [
            "http://10.1.2.3/",
            "https://10.1.2.3:8443/",
            "http://127.0.0.1:9000/",
            "http://0x7f.1:9000/",
            "http://minio:9000/",
            "http://[::1]:9000/",
        ] {
            assert_eq!(verdict(url), Verdict::Open, "{url}");
        }
        for url in [
            "https://8.8.8.8/",
            "https://example.org/",
            "http://minio/",
            "http://localhost:9000/",
        ] {
            assert_eq!(verdict(url), Verdict::Check, "{url}");
        }
        for url in [
            "http://127.0.0.1/",
            "http://127.0.0.1:9001/",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f000001/",
            "http://0177.0.0.1/",
            "http://[::1]/",
            "http://10.2.0.1/",
            "http://[::ffff:10.1.2.3]/",
            "http://[::ffff:7f00:1]:9000/",
            "http://0/",
            "http://169.254.169.254/latest/meta-data/",
            "http://１２７.0.0.1/",
            "data:,hello",
            "file:///etc/passwd",
        ] {
            assert_eq!(verdict(url), Verdict::Refused, "{url}");
        }
    }
}
