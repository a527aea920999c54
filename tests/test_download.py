# SPDX-License-Identifier: Apache-2.0
"""Tests of what `audio_mmser` and `mmser.examples` fetch from addresses, see SECURITY.md."""

import io
import threading
import time
import zipfile

import fsspec
import numpy as np
import pytest
from tiny_corpus import tiny_model, tiny_processor
from unkind_server import FINE, METADATA, unkind_server

import audio_mmser
from mmser.examples import ExampleReader
from processing_mmser import MMSERPipeline


@pytest.fixture
def address(monkeypatch):
    """Of a server that is unkind, with limits that it reaches soon."""
    monkeypatch.setattr(audio_mmser, "MAX_DOWNLOAD", 2**22)
    monkeypatch.setattr(audio_mmser, "MAX_WAIT", 2)
    monkeypatch.setattr(audio_mmser, "SILENCE_OF_SERVER", 1)
    with unkind_server() as address:
        yield address


@pytest.mark.parametrize(
    "name",
    ["fine", "without_length", "in_chunks", "more_than_it_says", "to_fine", "to_fine_with_words_without_end"],
)
def test_what_is_behind_an_address_comes_as_it_is(address, name):
    before = threading.active_count()
    assert audio_mmser.download(f"{address}/{name}") == FINE
    assert threading.active_count() <= before + 2  # those of the server


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("endless", "it is larger than 4,194,304 bytes: download it, cut it, and give the files"),
        ("endless_chunks", "it is larger than 4,194,304 bytes: download it, cut it, and give the files"),
        ("huge", "it is larger than 4,194,304 bytes: download it, cut it, and give the files"),
        ("cut", "it is cut short: 4,000 of 40,000 bytes came"),
        ("slow", "it takes longer than 2 s"),
        ("slow_in_its_headers", "it takes longer than 2 s"),
        ("no_answer", "nothing of HTTP"),
        ("to_file", "HTTP Error 302: .*"),
        ("to_ftp", "it leads to 'ftp://127.0.0.1/a.wav', and only http:// and https:// are read"),
        ("to_metadata", "169.254.169.254 is where clouds tell machines their passwords, and is not read"),
        ("to_metadata_in_disguise", "169.254.169.254 is where clouds tell machines their passwords, and is not read"),
        ("to_metadata_in_ipv6", ".*169.254.169.254 is where clouds tell machines their passwords, and is not read"),
        ("in_circles", "it leads from address to address"),
    ],
)
def test_a_server_cannot_fill_the_memory_take_for_ever_or_lead_elsewhere(address, name, said):
    start = time.monotonic()
    place = f"{address}/{name}"
    with pytest.raises(ValueError, match=rf"^audio '{place}': cannot be downloaded \({said}\)$"):
        audio_mmser.download(place)
    assert time.monotonic() - start < 4


def test_the_internet_does_not_lead_into_the_network_of_a_machine(address, monkeypatch):
    real = audio_mmser._is_public
    monkeypatch.setattr(audio_mmser, "_is_public", lambda number: number == "127.0.0.1" or real(number))
    with pytest.raises(
        ValueError, match=r"it leads to 'http://10\.0\.0\.1/a\.wav', a machine that the internet does not"
    ):
        audio_mmser.download(f"{address}/to_private")
    assert real("8.8.8.8") and real("2001:4860:4860::8888")
    assert not any(map(real, ["127.0.0.1", "10.1.2.3", "192.168.0.1", "::1", "fe80::1%eth0", "::ffff:10.0.0.1"]))


def test_a_name_that_means_another_machine_when_it_is_asked_is_refused(address, monkeypatch):
    monkeypatch.setattr(audio_mmser, "_numbers", lambda _: ["8.8.8.8"])
    monkeypatch.setattr(audio_mmser, "SECRETS", ("127.0.0.1",))
    with pytest.raises(ValueError, match=r"127\.0\.0\.1 is where clouds tell machines their passwords"):
        audio_mmser.download(f"{address}/fine")


@pytest.mark.parametrize(
    "place", [METADATA, "http://[fd00:ec2::254]/", "http://100.100.100.200/latest", "https://[fe80::1]/"]
)
def test_where_clouds_keep_passwords_nothing_is_read(place):
    with pytest.raises(ValueError, match="is where clouds tell machines their passwords, and is not read"):
        audio_mmser.download(place)


@pytest.mark.parametrize(
    "place", ["http://", "http://[", "http://a b/", "http://\u202e.x/", "http://a..b/", "https://127.0.0.1:0/a"]
)
def test_an_address_that_is_none_is_one_sentence(place):
    with pytest.raises(ValueError, match=r"^audio '.*': cannot be downloaded \(.+\)$"):
        audio_mmser.download(place)


def test_what_is_read_from_elsewhere_is_bounded(monkeypatch):
    monkeypatch.setattr(audio_mmser, "MAX_DOWNLOAD", 2**21)
    assert audio_mmser.read_bounded(io.BytesIO(b"abc").read) == b"abc"
    assert len(audio_mmser.read_bounded(io.BytesIO(bytes(2**21)).read)) == 2**21
    with pytest.raises(ValueError, match="larger than 2,097,152 bytes"):
        audio_mmser.read_bounded(lambda size: bytes(size))


@pytest.mark.parametrize("name", ["endless", "slow", "to_metadata"])
def test_the_pipeline_and_the_rows_of_data_read_no_more(address, name):
    row = {"audio": f"{address}/{name}", "labels": 0, "row": "train row 3"}
    said = rf"audio '{address}/{name}': cannot be downloaded \((it is larger|it takes longer|169\.254)"
    with pytest.raises(ValueError, match=said):
        MMSERPipeline(tiny_model().eval(), processor=tiny_processor(), device="cpu")(row["audio"])
    with pytest.raises(ValueError, match=f"^train row 3: {said}"):
        ExampleReader()(row, np.random.default_rng(0))


def test_what_other_kinds_of_addresses_hold_is_bounded_too(monkeypatch):
    monkeypatch.setattr(audio_mmser, "MAX_DOWNLOAD", 2**21)
    with fsspec.open("memory://large.wav", "wb") as file:
        file.write(bytes(2**21 + 1))
    row = {"audio": "memory://large.wav", "labels": 0, "row": "train row 3"}
    with pytest.raises(ValueError, match=r"^train row 3: .*memory://large\.wav: it is larger than 2,097,152 bytes"):
        ExampleReader()(row, np.random.default_rng(0))


def test_what_an_archive_becomes_is_bounded_too(monkeypatch, tmp_path):
    """A few kilobytes, of which four megabytes become."""
    monkeypatch.setattr(audio_mmser, "MAX_DOWNLOAD", 2**21)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.wav", bytes(2**22))
    row = {"audio": f"zip://a.wav::{tmp_path / 'a.zip'}", "labels": 0, "row": "train row 3"}
    assert (tmp_path / "a.zip").stat().st_size < 2**14
    with pytest.raises(ValueError, match=r"^train row 3: .*a\.zip: it is larger than 2,097,152 bytes"):
        ExampleReader()(row, np.random.default_rng(0))
