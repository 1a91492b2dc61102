"""What the command line makes of what lies beside a manifest: a Function's code, an App's image."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest

from edgeward.cli.kinds import load_kinds
from edgeward.cli.manifests import packed
from edgeward.core.errors import Invalid
from edgeward.core.manifest import decode_manifest, read_files


def source(tmp_path: Path, runtime: str, given: str, more: str = "") -> Any:
    load_kinds()
    file = tmp_path / "f.yaml"
    file.write_text(
        f"apiVersion: edgeward/v1\nkind: Function\nmetadata: {{name: f}}\nspec:\n  runtime: {runtime}\n"
        f"  source: {given}\n{more}"
    )
    (manifest,) = read_files([file])
    assert packed(manifest) == ()
    return decode_manifest(manifest).spec.source


def test_a_file_is_put_in_as_its_runtime_looks_for_it(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/hello.py").write_text("def handler(event, context): ...\n")
    (tmp_path / "code/hello.cjs").write_text("exports.handler = () => 1;\n")
    (tmp_path / "run.sh").write_text("#!/bin/sh\ncat\n")
    (tmp_path / "m.wat").write_text("(module)")
    (tmp_path / "m.wasm").write_bytes(b"\0asm\1\0\0\0")
    assert source(tmp_path, "python", "{file: code/hello.py}").inline.startswith("def handler")
    assert source(tmp_path, "node", "{file: code/hello.cjs}").files == {"main.cjs": "exports.handler = () => 1;\n"}
    assert source(tmp_path, "command", "{file: run.sh}", "  mode: stdio\n").inline == "#!/bin/sh\ncat\n"
    assert source(tmp_path, "wasm", "{file: m.wat}").inline == "(module)"
    assert base64.b64decode(source(tmp_path, "wasm", "{file: m.wasm}").files["main.wasm"])[:4] == b"\0asm"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{file: gone.py}", "No such file"),
        ("{file: f.yaml, inline: x}", "in one way"),
        ("{file: picture.py}", "is no text"),
        ("{file: large.py}", "has more than"),
        ("{file: 3}", "in one way"),
    ],
)
def test_a_file_that_cannot_be_taken_is_named_with_its_line(tmp_path: Path, given: str, words: str) -> None:
    (tmp_path / "picture.py").write_bytes(b"\xff\xfe")
    (tmp_path / "large.py").write_bytes(b"#" * (2 << 20))
    with pytest.raises(Invalid, match=words) as e:
        source(tmp_path, "python", given)
    assert e.value.line == 6 and e.value.file.endswith("f.yaml")


def test_an_image_archive_is_named_by_what_is_in_it(tmp_path: Path) -> None:
    load_kinds()
    file = tmp_path / "a.yaml"

    def taken(archive: str, *, pack: bool = True) -> tuple[Any, Any]:
        text = "apiVersion: edgeward/v1\nkind: App\nmetadata: {name: a}\nspec:\n  container: {archive: "
        file.write_text(f"{text}{archive}}}\n")
        (manifest,) = read_files([file])
        uploads = packed(manifest, pack)
        return decode_manifest(manifest).spec.container.archive, uploads

    (tmp_path / "box.tar").write_bytes(b"box")
    digest = f"sha256:{hashlib.sha256(b'box').hexdigest()}"
    assert taken("box.tar") == (digest, ((digest, tmp_path / "box.tar"),))
    assert taken(digest) == (digest, ()), "it is at the hub already"
    assert taken("gone.tar", pack=False)[1] == (), "to be deleted it need not be there"
    with pytest.raises(Invalid, match="No such file") as e:
        taken("gone.tar")
    assert (e.value.field, e.value.line) == ("$.spec.container.archive", 5)
