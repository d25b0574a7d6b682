//! Our network on a real libvirt, with two tiny guests on it: who reaches whom.

// A test fails by panicking, in its helpers too, and tells what it saw.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

mod machine_guest;

use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;
use std::time::Duration;

use cannery::machine::libvirt::Libvirt;
use cannery::machine::network::{HostPort, NetworkPlan, Protocol, firewall, provide, remove};
use machine_guest::{Net, SYSTEM, Site, plan};

fn ping(to: Ipv4Addr) -> String {
    format!("ping -c 2 -W 2 {to} >/dev/null 2>&1")
}

fn connect(to: Ipv4Addr, port: u16) -> String {
    format!("nc -w 2 {to} {port} </dev/null >/dev/null 2>&1")
}

/// A listener on all of the host's addresses that accepts for as long as the test runs.
fn listen() -> u16 {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    port
}

#[tokio::test]
#[ignore = "needs libvirt, QEMU, nft as root and the tiny guest"]
async fn guests_reach_the_world_and_not_each_other() {
    let site = Site::new();
    let (open, shut) = (listen(), listen());
    let plan = NetworkPlan {
        host_ports: vec![HostPort {
            protocol: Protocol::Tcp,
            port: open,
        }],
        ..plan("machine_iso", "miso", 1)
    };
    remove(&site.libvirt, &plan, site.folder.path()).await.unwrap();
    let _net = Net { plan: plan.clone() };
    provide(&site.libvirt, &plan, site.folder.path()).await.unwrap();
    let slots = plan.slots();
    let a = site.start("machine-iso-a", &plan, &slots[0], "").await;
    let b = site.start("machine-iso-b", &plan, &slots[1], "").await;
    a.wait();
    b.wait();
    let gateway = plan.gateway();

    // What a guest needs is there.
    assert!(a.run("ip -4 addr show").1.contains(&format!("{}/24", a.address)));
    assert!(a.can(&ping(gateway)));
    assert!(a.can(&format!("nslookup slot-1 {gateway} >/dev/null 2>&1")));
    assert!(a.can(&connect(gateway, open)));

    // The host's other services are not, under whatever address of the host.
    assert!(!a.can(&connect(gateway, shut)));
    let other = host_address();
    assert!(!a.can(&connect(other, shut)));

    // No other guest: directly …
    assert!(!a.can(&ping(b.address)));
    assert!(!a.can(&connect(b.address, 22)));
    // … nor through the gateway, which both ask to carry it.
    for (guest, peer) in [(&a, &b), (&b, &a)] {
        assert!(guest.can(&format!("ip route replace {} via {gateway}", peer.address)));
    }
    assert!(!a.can(&ping(b.address)));
    assert!(!a.can(&connect(b.address, 22)));

    // No address but its own: a free slot's …
    let free = slots[2].address;
    assert!(a.can(&format!("ip addr add {free}/24 dev eth0")));
    assert!(!a.can(&format!("ping -c 2 -W 2 -I {free} {gateway} >/dev/null 2>&1")));
    // … nor another MAC, tried behind the back of this connection.
    assert!(a.can(&format!(
        "(sleep 1; old=$(cat /sys/class/net/eth0/address)
          ip link set eth0 down; ip link set eth0 address {mac}; ip link set eth0 up
          ping -c 2 -W 2 {gateway} >/tmp/spoof 2>&1; echo $? >>/tmp/spoof
          ip link set eth0 down; ip link set eth0 address $old; ip link set eth0 up
          echo done >>/tmp/spoof) >/dev/null 2>&1 </dev/null &",
        mac = slots[2].mac
    )));
    std::thread::sleep(Duration::from_secs(8));
    a.wait();
    let spoof = a.run("cat /tmp/spoof").1;
    assert!(spoof.ends_with("1\ndone\n"), "{spoof}");

    // Without the firewall all of it works, so it was the firewall that prevented it.
    firewall::remove(&plan, site.folder.path()).await.unwrap();
    let direct = format!("ip route del {}; {}", b.address, ping(b.address));
    let without = [
        a.can(&connect(gateway, shut)),
        b.can(&format!("ip route del {}", a.address)),
        a.can(&direct),
    ];

    for guest in [&a, &b] {
        site.libvirt.destroy(&guest.name).await.unwrap();
    }
    remove(&site.libvirt, &plan, site.folder.path()).await.unwrap();
    assert_eq!(without, [true; 3]);
}

/// An address of the host on another interface than loopback and the test's bridge.
fn host_address() -> Ipv4Addr {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    // Nothing is sent: this only asks which address would be used.
    socket.connect("192.0.2.254:9").unwrap();
    match socket.local_addr().unwrap().ip() {
        std::net::IpAddr::V4(address) => address,
        std::net::IpAddr::V6(address) => panic!("{address} is no IPv4 address"),
    }
}

#[tokio::test]
#[ignore = "needs libvirt and nft as root"]
async fn a_network_is_made_once_and_then_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let libvirt = Libvirt::open(SYSTEM).unwrap();
    let plan = plan("machine_once", "monce", 2);
    remove(&libvirt, &plan, folder.path()).await.unwrap();

    let _net = Net { plan: plan.clone() };
    let first = provide(&libvirt, &plan, folder.path()).await.unwrap();
    assert!(first.started && first.firewall_loaded);
    let again = provide(&libvirt, &plan, folder.path()).await.unwrap();
    assert!(!again.started && !again.firewall_loaded);

    // Somebody empties a chain: it is put back, and the network is not touched.
    let flushed = Command::new("nft")
        .args(["flush", "chain", "bridge", "cannery_machine_once", "pass"])
        .status()
        .unwrap();
    assert!(flushed.success());
    let mended = provide(&libvirt, &plan, folder.path()).await.unwrap();
    assert!(!mended.started && mended.firewall_loaded);

    // Two callers at once after the network was stopped: one starts it.
    libvirt.remove_network(&plan.name).await.unwrap();
    let other = Libvirt::open(SYSTEM).unwrap();
    let (one, two) = tokio::join!(
        provide(&libvirt, &plan, folder.path()),
        provide(&other, &plan, folder.path())
    );
    assert_eq!(
        [one.unwrap().started, two.unwrap().started]
            .iter()
            .filter(|s| **s)
            .count(),
        1
    );

    // Another number of slots is not arranged behind the jobs' backs.
    let wider = NetworkPlan {
        slots: 5,
        ..plan.clone()
    };
    let error = provide(&libvirt, &wider, folder.path())
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("its number of slots is 3") && error.contains("cannery network down"),
        "{error}"
    );

    // Nor the same subnet under another name.
    let rival = NetworkPlan {
        name: "machine_rival".to_owned(),
        bridge: "mriv".to_owned(),
        ..plan.clone()
    };
    let error = provide(&libvirt, &rival, folder.path())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("10.232.2.0/24 on monce"), "{error}");
    remove(&libvirt, &rival, folder.path()).await.unwrap();

    remove(&libvirt, &plan, folder.path()).await.unwrap();
    assert_eq!(libvirt.network(&plan.name).await.unwrap(), None);
    let listed = Command::new("nft").args(["list", "tables"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&listed.stdout).contains("cannery_machine_"));
}
