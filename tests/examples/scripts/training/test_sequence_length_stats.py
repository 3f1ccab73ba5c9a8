import pytest

from examples.data.precomputed import write_samples
from examples.scripts.training.sequence_length_stats import main

SIZES = {"original_vocab_size": 10, "num_levels": 2, "codebook_size": 4, "meta": {}}


def test_percentiles_of_sample_files(tmp_path, capsys):
    samples = [([1] * length, [1] * length) for length in range(1, 101)]
    write_samples(tmp_path / "deep" / "beauty_train.pt", samples, **SIZES)
    write_samples(tmp_path / "empty.pt", [], **SIZES)
    (tmp_path / "final.pt").write_bytes(b"no sample file")
    main(["--data_root", str(tmp_path)])
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "beauty_train" in line]
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells == ["deep/beauty_train.pt", "100", "51", "76", "91", "96", "100", "100"]
    assert "final.pt" not in printed


def test_no_sample_files(tmp_path):
    with pytest.raises(SystemExit, match="holds no sample files"):
        main(["--data_root", str(tmp_path)])
