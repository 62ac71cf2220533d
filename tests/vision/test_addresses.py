import ipaddress

import pytest

from vision.addresses import AddressPolicy, BlockedAddressError, CheckedResolver

NOT_GLOBAL = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1",
    "172.31.255.255", "192.0.0.1", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",
    "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2001:0:7f00:1::", "2002:7f00:1::", "2002:808:808::1", "fc00::1", "fd00:ec2::254",
    "fe80::1", "fe80::1%1", "fec0::1", "ff02::1", "3fff::1", "4000::1",
]  # fmt: skip
GLOBAL = ["1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001::200e", "::ffff:8.8.8.8", "64:ff9b::808:808"]
SPELLINGS = ["2130706433", "0177.0.0.1", "0x7f.0.0.1", "0x7f000001", "127.1", "127.0.1", "0", "017700000001", "00000127.0.0.1", "134744072"]


@pytest.mark.parametrize("address", NOT_GLOBAL)
def test_addresses_that_are_not_global_are_refused(address: str) -> None:
    policy = AddressPolicy()

    assert not policy.permits(ipaddress.ip_address(address))
    with pytest.raises(BlockedAddressError):
        policy.check_host(address)


@pytest.mark.parametrize("address", GLOBAL)
def test_global_addresses_are_permitted(address: str) -> None:
    policy = AddressPolicy()

    assert policy.permits(ipaddress.ip_address(address))
    policy.check_host(address)


@pytest.mark.parametrize("host", SPELLINGS)
def test_odd_spellings_of_addresses_are_refused_even_where_loopback_is_open(host: str) -> None:
    with pytest.raises(BlockedAddressError):
        AddressPolicy((ipaddress.ip_network("0.0.0.0/0"),)).check_host(host)


@pytest.mark.parametrize("host", ["example.com", "1.2.3.4.example.com", "localhost.example", "a", "xn--bcher-kva.example"])
def test_names_are_left_to_the_resolver(host: str) -> None:
    AddressPolicy().check_host(host)


@pytest.mark.parametrize("host", ["localhost", "LocalHost.", "a.localhost", "localhost.localdomain"])
def test_names_for_this_machine_are_refused_before_anyone_is_asked(host: str) -> None:
    with pytest.raises(BlockedAddressError):
        AddressPolicy().check_host(host)
    AddressPolicy((ipaddress.ip_network("127.0.0.0/8"),)).check_host(host)


def test_a_final_dot_does_not_hide_an_address() -> None:
    with pytest.raises(BlockedAddressError):
        AddressPolicy().check_host("127.0.0.1.")


@pytest.mark.parametrize("address", ["10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::10.1.2.3", "fd00::1"])
def test_opened_networks_are_permitted_in_every_form(address: str) -> None:
    policy = AddressPolicy((ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")))

    assert policy.permits(ipaddress.ip_address(address))


def test_opening_one_network_opens_no_other() -> None:
    policy = AddressPolicy((ipaddress.ip_network("10.0.0.0/8"),))

    assert not policy.permits(ipaddress.ip_address("127.0.0.1"))
    assert not policy.permits(ipaddress.ip_address("192.168.0.1"))


async def test_the_resolver_gives_only_permitted_addresses() -> None:
    async def look_up(host: str) -> list[str]:
        return ["127.0.0.1", "8.8.8.8", "::1", "2606:4700:4700::1111"]

    results = await CheckedResolver(AddressPolicy(), look_up).resolve("mixed.example", 80)

    assert [result["host"] for result in results] == ["8.8.8.8", "2606:4700:4700::1111"]


async def test_the_resolver_refuses_names_that_lead_to_private_addresses_only() -> None:
    async def look_up(host: str) -> list[str]:
        return ["10.0.0.5", "::ffff:169.254.169.254"]

    with pytest.raises(BlockedAddressError):
        await CheckedResolver(AddressPolicy(), look_up).resolve("rebind.example", 80)
