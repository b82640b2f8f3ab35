//! Where a client comes from: the peer's address, or what a proxy that we trust says of it.
//!
//! `X-Forwarded-For` is read from its end, which the nearest proxy wrote, up to the first address that is no trusted
//! proxy: whatever stands before that, the client may have written itself.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use axum::{
    extract::{ConnectInfo, FromRequestParts},
    http::{HeaderMap, request::Parts},
};
use ipnet::IpNet;

use crate::http::{App, refusal::Refusal};

/// Where a client comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientAddress(IpAddr);

/// `server.trusted_proxies`.
#[derive(Debug, Clone, Default)]
pub struct TrustedProxies(Vec<IpNet>);

impl ClientAddress {
    pub fn ip(self) -> IpAddr {
        self.0
    }

    /// As limits count it: an IPv6 client has a whole /64 to choose from.
    pub fn counted(self) -> ClientAddress {
        match self.0 {
            IpAddr::V6(address) => ClientAddress(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into()),
            IpAddr::V4(_) => self,
        }
    }
}

impl TrustedProxies {
    /// Addresses and networks, or the first that is neither.
    pub fn parse(list: &[String]) -> Result<TrustedProxies, String> {
        let network = |text: &String| match (text.parse::<IpNet>(), text.parse::<IpAddr>()) {
            (Ok(network), _) => Ok(network),
            (_, Ok(address)) => Ok(address.into()),
            _ => Err(text.clone()),
        };
        list.iter().map(network).collect::<Result<_, _>>().map(TrustedProxies)
    }

    fn names(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }

    fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let mut client = peer.to_canonical();
        let lines: Vec<_> = headers.get_all("x-forwarded-for").iter().collect();
        let mut hops = lines.into_iter().rev().flat_map(|line| line.to_str().unwrap_or_default().rsplit(','));
        while self.names(client) {
            // What cannot be read was written by nobody whom we trust to: the last one known counts.
            let Some(next) = hops.next().and_then(hop) else { break };
            client = next;
        }
        client
    }
}

/// `10.0.0.1`, `10.0.0.1:5000`, `2001:db8::1`, `[2001:db8::1]:5000`.
fn hop(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let address = text.parse().ok().or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip()));
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse().ok();
    address.or_else(bracketed).map(|address: IpAddr| address.to_canonical())
}

impl From<IpAddr> for ClientAddress {
    fn from(address: IpAddr) -> ClientAddress {
        ClientAddress(address.to_canonical())
    }
}

impl fmt::Display for ClientAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromRequestParts<App> for ClientAddress {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<ClientAddress, Refusal> {
        // A server that is asked without a socket (a test of the router) has one client: itself.
        let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>().map_or(Ipv6Addr::LOCALHOST.into(), |peer| peer.0.ip());
        Ok(app.limits.trusted_proxies.client(peer, &parts.headers).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(peer: &str, forwarded: &[&str]) -> String {
        let trusted = TrustedProxies::parse(&["10.0.0.0/8".into(), "2001:db8::7".into()]).unwrap();
        let mut headers = HeaderMap::new();
        for line in forwarded {
            headers.append("x-forwarded-for", line.parse().unwrap());
        }
        trusted.client(peer.parse().unwrap(), &headers).to_string()
    }

    #[test]
    fn p7_only_a_trusted_peer_may_say_where_a_client_comes_from() {
        assert_eq!(client("9.9.9.9", &["1.1.1.1"]), "9.9.9.9");
        assert_eq!(client("10.1.2.3", &["1.1.1.1"]), "1.1.1.1");
        assert_eq!(client("2001:db8::7", &["1.1.1.1:443"]), "1.1.1.1");
        assert_eq!(client("::ffff:10.1.2.3", &["1.1.1.1"]), "1.1.1.1", "a mapped address is the address");
        assert_eq!(client("10.1.2.3", &[]), "10.1.2.3");
    }

    #[test]
    fn p7_what_a_client_wrote_itself_stands_before_what_the_proxy_wrote() {
        assert_eq!(client("10.1.2.3", &["6.6.6.6, 1.1.1.1"]), "1.1.1.1");
        assert_eq!(client("10.1.2.3", &["6.6.6.6", "1.1.1.1, 10.0.0.9"]), "1.1.1.1", "over two lines and two proxies");
        assert_eq!(client("10.1.2.3", &["6.6.6.6, unknown, 10.0.0.9"]), "10.0.0.9");
        assert_eq!(client("10.1.2.3", &["[2001:db8::1]"]), "2001:db8::1");
        assert_eq!(client("10.1.2.3", &["10.0.0.8"]), "10.0.0.8", "nobody but proxies");
    }

    #[test]
    fn an_ipv6_client_counts_by_its_network() {
        let of = |text: &str| ClientAddress::from(text.parse::<IpAddr>().unwrap()).counted();
        assert_eq!(of("2001:db8:1:2::1"), of("2001:db8:1:2:ffff::9"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_ne!(of("1.2.3.4"), of("1.2.3.5"));
        assert_eq!(of("::ffff:1.2.3.4"), of("1.2.3.4"));
    }

    #[test]
    fn what_is_no_address_is_named() {
        assert_eq!(TrustedProxies::parse(&["10.0.0.1".into(), "proxy".into()]).unwrap_err(), "proxy");
    }
}
