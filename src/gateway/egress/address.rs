//! Addresses that no cell may reach, whatever name they hide behind. Pure. A name is refused when any one of its
//! addresses is: a name that points both in and out is a trap.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Why an address is refused; `None` where it is a public one. `own` are addresses of this host.
pub fn refused(address: IpAddr, own: &[IpAddr]) -> Option<&'static str> {
    if own.contains(&address) {
        return Some("an address of this host");
    }
    match address {
        IpAddr::V4(v4) => refused_v4(v4),
        IpAddr::V6(v6) => match embedded(v6) {
            Some(why) => Some(why),
            None => refused_v6(v6),
        },
    }
}

fn refused_v4(address: Ipv4Addr) -> Option<&'static str> {
    let [a, b, c, d] = address.octets();
    Some(match (a, b, c, d) {
        (0, ..) => "the unspecified network",
        (10, ..) | (172, 16..=31, ..) | (192, 168, ..) => "a private address",
        (100, 64..=127, ..) => "a carrier's shared address",
        (127, ..) => "a loopback address",
        (169, 254, ..) => "a link-local or metadata address",
        (192, 0, 0, _) => "a protocol assignment",
        (192, 0, 2, _) | (198, 51, 100, _) | (203, 0, 113, _) => "a documentation address",
        (192, 31, 196, _) | (192, 52, 193, _) | (192, 175, 48, _) => "a special-purpose address",
        (192, 88, 99, _) => "a 6to4 relay",
        (198, 18..=19, ..) => "a benchmarking address",
        (168, 63, 129, 16) => "a metadata address",
        (224..=239, ..) => "a multicast address",
        (255, 255, 255, 255) => "the broadcast address",
        (240..=255, ..) => "a reserved address",
        _ => return None,
    })
}

/// IPv6 addresses that stand for IPv4 ones: whatever they hold, nobody needs them.
fn embedded(address: Ipv6Addr) -> Option<&'static str> {
    let s = address.segments();
    Some(match s {
        [0, 0, 0, 0, 0, 0, 0, 0] => "the unspecified address",
        [0, 0, 0, 0, 0, 0, 0, 1] => "a loopback address",
        [0, 0, 0, 0, 0, 0xffff, ..] => "an IPv4-mapped address",
        [0, 0, 0, 0, 0xffff, 0, ..] => "an IPv4-translated address",
        [0, 0, 0, 0, 0, 0, ..] => "an IPv4-compatible address",
        [0x64, 0xff9b, ..] => "a NAT64 address",
        [0x2001, 0, ..] => "a Teredo address",
        [0x2002, ..] => "a 6to4 address",
        // ISATAP hides an IPv4 address below any prefix.
        [_, _, _, _, 0 | 0x200, 0x5efe, ..] => "an ISATAP address",
        _ => return None,
    })
}

fn refused_v6(address: Ipv6Addr) -> Option<&'static str> {
    let s = address.segments();
    Some(match s[0] {
        0xfc00..=0xfdff => "a unique local address",
        0xfe80..=0xfebf => "a link-local address",
        0xfec0..=0xfeff => "a site-local address",
        0xff00..=0xffff => "a multicast address",
        0x2001 if s[1] == 0xdb8 => "a documentation address",
        0x2001 if s[1] < 0x200 => "a protocol assignment",
        0x3fff if s[1] < 0x1000 => "a documentation address",
        // Only this part of the space is given out to the public.
        0x2000..=0x3fff => return None,
        _ => "a reserved address",
    })
}

/// Addresses of this host's interfaces, as they are now.
///
/// # Errors
/// What the system says.
pub fn own_addresses() -> std::io::Result<Vec<IpAddr>> {
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the list is written to `first` and freed below.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let mut addresses = Vec::new();
    let mut at = first;
    while !at.is_null() {
        // SAFETY: `at` is an entry of the list, which lives until it is freed.
        let entry = unsafe { &*at };
        if !entry.ifa_addr.is_null() {
            // SAFETY: every address begins with its family, which says how long it is.
            let family = i32::from(unsafe { (*entry.ifa_addr).sa_family });
            if family == libc::AF_INET {
                // SAFETY: an AF_INET address is a `sockaddr_in`; it may be unaligned.
                let v4 = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned() };
                addresses.push(IpAddr::V4(Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr))));
            } else if family == libc::AF_INET6 {
                // SAFETY: an AF_INET6 address is a `sockaddr_in6`; it may be unaligned.
                let v6 = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned() };
                addresses.push(IpAddr::V6(Ipv6Addr::from(v6.sin6_addr.s6_addr)));
            }
        }
        at = entry.ifa_next;
    }
    // SAFETY: `first` came from getifaddrs and is used no more.
    unsafe { libc::freeifaddrs(first) };
    Ok(addresses)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One or more of each class.
    pub(in crate::gateway::egress) const REFUSED: [&str; 52] = [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "10.255.255.255",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.0.1",
        "100.64.0.1",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.0.1",
        "169.254.169.254",
        "169.254.0.1",
        "192.0.0.1",
        "192.0.0.170",
        "192.0.2.1",
        "198.51.100.1",
        "203.0.113.1",
        "192.88.99.1",
        "198.18.0.1",
        "198.19.255.255",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "168.63.129.16",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:8.8.8.8",
        "::127.0.0.1",
        "::a00:1",
        "::ffff:0:127.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2001::1",
        "2001:0:1::",
        "2001:db8::1",
        "2001:20::1",
        "3fff::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "febf::1",
        "fec0::1",
        "ff02::1",
        "100::1",
        "4000::1",
        "5f00::1",
        "2600::5efe:7f00:1",
    ];

    #[test]
    fn each_class_is_refused() {
        for text in REFUSED {
            assert!(refused(text.parse().unwrap(), &[]).is_some(), "{text}");
        }
    }

    #[test]
    fn public_addresses_pass_unless_they_are_this_hosts() {
        for text in [
            "1.1.1.1",
            "9.9.9.9",
            "172.15.0.1",
            "172.32.0.1",
            "100.63.0.1",
            "100.128.0.1",
            "192.0.1.1",
            "198.17.0.1",
            "198.20.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2a00::1",
            "2620:fe::fe",
        ] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(refused(address, &[]), None, "{text}");
            assert_eq!(refused(address, &[address]), Some("an address of this host"));
        }
    }

    #[test]
    fn this_host_knows_its_addresses() {
        assert!(own_addresses().unwrap().contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)));
    }

    proptest! {
        #[test]
        fn an_ipv4_address_never_passes_in_an_ipv6_one(bits in any::<u32>()) {
            let v4 = Ipv4Addr::from(bits);
            let [a, b] = [(bits >> 16) as u16, bits as u16];
            for v6 in [
                v4.to_ipv6_mapped(),
                Ipv6Addr::new(0, 0, 0, 0, 0, 0, a, b),
                Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, a, b),
                Ipv6Addr::new(0x2002, a, b, 0, 0, 0, 0, 1),
                Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, a, b),
            ] {
                prop_assert!(refused(IpAddr::V6(v6), &[]).is_some());
            }
        }
    }
}
