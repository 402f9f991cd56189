"""The decoding benchmark measures every variant on the same work."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "benchmarks" / "decode.py"


@pytest.mark.slow
def test_every_variant_is_measured_against_generate(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("decode_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    decode = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(decode)
    sizes = ["--batch", "2", "--prompt", "4", "--response", "4", "--rounds", "2", "--out", str(tmp_path / "out.json")]
    decode.main(sizes)
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written["rows"]) == ["generate", "dynamic", "static"]
    assert written["rows"]["generate"]["to_generate"] == 1
    for name, row in written["rows"].items():
        assert len(written["seconds"][name]) == 2
        assert row["tokens_per_second"] > 0
        assert 0 < row["of_roofline"] < 1
    with pytest.raises(SystemExit, match="not"):
        decode.measure({"short": lambda: decode.torch.zeros(1, 2)}, (1, 3), 1, cuda=False)
