"""Weight files from the web: a server on this machine stands in for a hub."""

import hashlib
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from experiment.download import local_file
from experiment.errors import UserError


class Evil:
    def __reduce__(self):
        return (open, ("harm.txt", "w"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"fc.weight": torch.ones(2, 3)}, path)
    return path.read_bytes()


@pytest.fixture
def hub(weights, tmp_path, monkeypatch):
    """The address of a server, and the paths that were asked for; the cache is an empty folder."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith("/missing"):
                return self.send_error(404)
            body = {
                "/page/pytorch_model.bin": b"<html>please log in</html>",
                "/evil/pytorch_model.bin": pickle.dumps(Evil()),
            }.get(self.path, weights)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if "/cut/" in self.path else body)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("cache/**/*") if path.is_file())


def test_a_file_is_downloaded_once_and_its_hash_is_printed(hub, weights, tmp_path, capsys):
    address, asked = hub
    one, two = (local_file(f"{address}/one/pytorch_model.bin") for _ in range(2))
    assert one == two
    assert one.read_bytes() == weights
    assert len(asked) == 1
    assert hashlib.sha256(weights).hexdigest() in capsys.readouterr().out
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert one.stat().st_mode == ordinary.stat().st_mode  # the cache may be others', too


def test_files_of_one_name_from_two_addresses_are_two(hub, tmp_path):
    address, _ = hub
    one, two = (local_file(f"{address}/{name}/pytorch_model.bin") for name in ("one", "two"))
    assert one != two
    assert len(cached(tmp_path)) == 2


def test_the_hash_in_the_address_is_checked_also_in_the_cache(hub, weights, tmp_path):
    address, _ = hub
    url, good = f"{address}/one/w.pth", hashlib.sha256(weights).hexdigest()
    for wrong in ("0" * 64, good[:63], ""):  # the last one of a shell's variable that is not set
        with pytest.raises(UserError, match=f"SHA-256 {good}, not '{wrong}'"):
            local_file(f"{url}#sha256={wrong}")
    assert cached(tmp_path) == []
    assert local_file(f"{url}#sha256={good.upper()}").is_file()
    with pytest.raises(UserError, match="SHA-256"):
        local_file(f"{url}#sha256={'0' * 64}")
    assert len(cached(tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("cut/w.pth", "only a part of one"),
        ("page/pytorch_model.bin", "no weight file"),
        ("evil/pytorch_model.bin", "not a safe one"),
        ("missing/w.pth", "cannot be downloaded: Not Found"),
    ],
)
def test_what_is_no_weight_file_is_refused_and_leaves_nothing(path, complaint, hub, tmp_path):
    with pytest.raises(UserError, match=complaint):
        local_file(f"{hub[0]}/{path}")
    assert cached(tmp_path) == []
    assert not (tmp_path / "harm.txt").exists()


def test_a_server_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cannot be downloaded: .*refused"):
        local_file("http://127.0.0.1:9/w.pth")


@pytest.mark.parametrize(
    "url", ["http://[", "http://[::1/w.pth", "http://", "https:///w", "file://", "http://a b/é"]
)
def test_an_address_that_is_none_is_one_line(url, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="cannot be downloaded"):
        local_file(url)
    assert cached(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 250, "é" * 120, b"\xff".decode(errors="surrogateescape")])
def test_a_name_of_any_length_and_bytes(name, weights, tmp_path, monkeypatch):
    """Two files of one long name from two folders are two, too."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for number in ("1", "2"):
        (tmp_path / number).mkdir()
        (tmp_path / number / name).write_bytes(weights)
        assert local_file(f"file://{tmp_path / number / name}").read_bytes() == weights
    assert len(cached(tmp_path)) == 2


def test_a_file_address_works_and_a_path_stays_a_path(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "w.pth").write_bytes(weights)
    assert local_file((tmp_path / "w.pth").as_uri()).read_bytes() == weights
    with pytest.raises(UserError, match="cannot be downloaded"):
        local_file((tmp_path / "none.pth").as_uri())
    assert local_file("some/w.pth") == Path("some/w.pth")
    assert local_file("C:/weights.pth") == Path("C:/weights.pth")
