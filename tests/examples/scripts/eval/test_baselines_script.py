import json
import subprocess
import sys

from examples.scripts.eval.baselines import main


def test_all_baselines_are_measured_and_written(data_root, tmp_path, capsys):
    output = tmp_path / "out" / "figures.json"
    figures = main(root=str(data_root), split="beauty", output=str(output))
    assert len(figures) == 7
    written = json.loads(output.read_text())
    assert written["figures"] == figures
    assert (written["users"], written["skipped_users"], written["items"]) == (28, 2, 40)
    printed = capsys.readouterr().out
    assert all(name in printed for name in figures)


def test_a_parameter_that_is_refused_is_one_message(tmp_path):
    path = tmp_path / "made.gin"
    path.write_text("main.split = 'sprots'")
    command = [sys.executable, "-m", "examples.scripts.eval.baselines", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "error: split is 'sprots'; allowed are 'beauty', 'sports', 'toys'" in ended.stderr
    assert "Traceback" not in ended.stderr
