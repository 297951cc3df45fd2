"""``chipseconds speculation`` as a user meets it."""

import json

import pytest

from simulator.roofline.acceptance import tokens_per_pass

VIEW = ["speculation", "--model", "llama-3-8b", "--slice", "h100-sxm:1", "--method", "eagle", "--max-num-seqs", "64"]


def test_table_json_and_plot_agree(run_cli, tmp_path):
    args = [*VIEW, "--tokens", "3", "--acceptance", "0.8", "--context", "1000"]
    file = tmp_path / "gain.svg"
    done = run_cli(*args, "--plot", str(file))
    found = json.loads(run_cli(*args, "--json").stdout)
    assert found["tokens_per_pass"] == pytest.approx([tokens_per_pass(0.8, i) for i in range(4)])
    assert len(found["speedup"]["3 drafts"]) == 64
    assert f"{found['speedup']['3 drafts'][0]:.2f}" in done.stdout
    assert found["best"][0] == "3 drafts"
    assert "drafted by an EAGLE head" in file.read_text(encoding="utf-8")


def test_a_curve_and_a_tree(run_cli):
    found = json.loads(run_cli(*VIEW, "--tree", "4,4", "--acceptance", "0.8,0.7", "--json").stdout)
    assert list(found["speedup"]) == ["no drafts", "tree of 8"]
    assert found["tokens_per_pass"] == pytest.approx([1, 1 + 0.8 + 0.56])


def test_attention_ranks(run_cli):
    args = [
        "speculation",
        "--model",
        "qwen3-30b-a3b",
        "--slice",
        "h100-sxm:4",
        "--shard",
        "dp4ep4",
        "--max-num-seqs",
        "32",
    ]
    done = run_cli(*args, "--method", "eagle", "--tokens", "1", "--acceptance", "0.8")
    assert "by the batch of each of 4 attention ranks" in done.stdout


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--tokens", "3", "--acceptance", "high"], 2, "write numbers"),
        (["--tokens", "3", "--acceptance", "1.5"], 2, "acceptance_rate"),
        (
            ["--tokens", "3", "--tree", "2,2", "--acceptance", "0.5"],
            2,
            "exactly one of num_speculative_tokens and tree",
        ),
        (["--tokens", "3", "--acceptance", "0.8", "--context", "2000000"], 1, "not one sequence"),
        (["--tokens", "3", "--acceptance", "0.8", "--plot", "gain.txt"], 2, "must end in"),
    ],
)
def test_refusals(run_cli, args, code, says):
    assert says in run_cli(*VIEW, *args, code=code).stderr
