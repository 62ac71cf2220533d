import ipaddress
from pathlib import Path
from typing import Any

import pytest

from vision.config import VisionConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_picture_bytes", 0),
        ("max_picture_pixels", 0),
        ("max_media_bytes_in_flight", 0),
        ("max_pixels_in_flight", 0),
        ("max_downloads", 0),
        ("max_pictures_per_request_in_flight", 0),
        ("budget_wait_s", -1),
        ("max_redirects", -1),
        ("connect_timeout_s", 0),
        ("first_byte_timeout_s", -1),
        ("fetch_timeout_s", 0),
        ("decode_timeout_s", 0),
        ("decode_memory_bytes", 1 << 20),
        ("num_decode_workers", 0),
        ("num_preprocess_workers", 0),
        ("processed_cache_bytes", -1),
        ("allowed_local_media_path", "/no/such/folder"),
        ("allow_private_media", ("10.0.0.0/33",)),
        ("allow_private_media", ("localhost",)),
    ],
)
def test_limits_that_make_no_sense_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        VisionConfig(**{name: value})


def test_private_networks_are_parsed(tmp_path: Path) -> None:
    config = VisionConfig(allow_private_media=("10.1.2.3/8", "fd00::/8", "192.168.0.7"), allowed_local_media_path=str(tmp_path))

    assert config.private_networks == tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "fd00::/8", "192.168.0.7/32")))
