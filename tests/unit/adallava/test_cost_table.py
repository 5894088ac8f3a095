"""`fmray cost`: the JSON contract, the table, FastV schedules, configs on disk, and errors."""

import argparse
import json

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PhiConfig

from fmray.adallava.presets import PRESETS
from fmray.commands.cost import add_arguments, run


@pytest.fixture
def cost(capsys):
    def call(line):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        assert run(parser.parse_args(line.split())) == 0
        return capsys.readouterr().out

    return call


def test_one_budget_prints_one_object(cost):
    answer = json.loads(
        cost("--preset llava-1.5-7b --tokens 644 --budget 0.85 --convention llm-viewer --json")
    )
    assert answer["units_on"] == 11
    assert answer["layers_run"] == 27
    assert answer["operations"] == 7224469491200
    assert answer["share"] == 0.84375
    assert answer["convention"] == "llm-viewer"
    assert answer["roofline_ms"]["V100"] == pytest.approx(69, abs=0.6)


def test_several_budgets_print_a_list(cost):
    answer = json.loads(
        cost("--preset llava-1.5-13b --design heads --budget 0.6 --budget 0.85 --device L4 --json")
    )
    assert [row["units_on"] for row in answer] == [20, 70]
    assert [row["layers_run"] for row in answer] == [24, 34]
    assert [list(row["roofline_ms"]) for row in answer] == [["L4"], ["L4"]]
    row = json.loads(cost("--preset llava-1.5-7b --design heads --budget 0.61 --json"))
    assert row["layers_run"] == 19.5


def test_fastv_equals_the_lengths_it_stands_for(cost):
    line = "--preset llava-1.5-7b --tokens 644 --fastv 2:0.5 --budget 0.6 --json"
    answer = json.loads(cost(line))
    assert answer["tokens"] == [644] * 2 + [356] * 30
    assert answer["layers_run"] == 18
    listed = ",".join(str(n) for n in answer["tokens"])
    again = json.loads(cost(f"--preset llava-1.5-7b --tokens {listed} --budget 0.6 --json"))
    assert again == answer


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_has_a_row_per_budget(cost, name):
    text = cost(f"--preset {name}")
    lines = text.splitlines()
    assert "roofline, not measured" in text
    header = next(index for index, line in enumerate(lines) if line.startswith("budget"))
    assert lines[header].split("  ")[0] == "budget"
    rows = lines[header : header + 8]
    assert len({len(row) for row in rows}) == 1
    assert rows[1].split()[:3] == [
        "1",
        *(["20/20", "40/40"] if "13b" in name else ["16/16", "32/32"]),
    ]
    assert "projector" in text


def test_default_budgets_omit_those_below_the_smallest(cost):
    text = cost("--preset llava-1.5-7b --fastv 2:0.5 --device V100")
    assert "644.28 from layer 0, 356.28 from layer 2" in text
    rows = [
        line.split()[0] for line in text.splitlines() if line.rstrip().endswith("%") or "%" in line
    ]
    assert rows == ["1", "0.95", "0.85", "0.75", "0.65", "0.6"]


def test_configs_on_disk_are_priced(cost, tmp_path):
    text = LlamaConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96
    )
    vision = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8,
    )  # fmt: skip
    LlavaConfig(text_config=text, vision_config=vision).save_pretrained(tmp_path / "vlm")
    PhiConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96
    ).save_pretrained(tmp_path / "phi")
    for source in (tmp_path / "vlm", tmp_path / "vlm" / "config.json"):
        answer = json.loads(cost(f"--config {source} --tokens 40 --budget 0.75 --json"))
        assert (answer["units_on"], answer["layers"], answer["vision"]["tokens"]) == (1, 4, 16)
    answer = json.loads(
        cost(f"--config {tmp_path / 'vlm'} --tokens 40 --fastv 1:0.5 --budget 1 --json")
    )
    assert answer["tokens"] == [40, 32, 32, 32]
    answer = json.loads(cost(f"--config {tmp_path / 'phi'} --tokens 40 --budget 1 --json"))
    assert answer["vision"] is None
    assert "MLP of 2 matrices" in cost(f"--config {tmp_path / 'phi'} --tokens 40")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--preset llava-2", "'llava-2' is unknown; there are llava-1.5-7b"),
        ("--preset mipha-3b --budget 0.3", "smallest budget here is 0.5"),
        ("--preset mipha-3b --budget much", "'much'"),
        ("--preset mipha-3b --tokens many", "--tokens is 'many'"),
        ("--preset mipha-3b --tokens 5,6", "2 entries"),
        ("--preset mipha-3b --tokens 0", "positive length"),
        ("--preset mipha-3b --device abacus", "'abacus'"),
        ("--preset mipha-3b --first 32", r"must be in 1\.\.31"),
        ("--preset mipha-3b --fastv half", "'half'; it is K:R"),
        ("--preset mipha-3b --fastv 2:", "it is K:R"),
        ("--preset mipha-3b --fastv 2:1.5", "R is 1.5"),
        ("--preset mipha-3b --fastv 16:0.5", r"1\.\.15"),
        ("--preset mipha-3b --fastv 2:0.5 --tokens 100", "729 of 100"),
        ("--preset mipha-3b --design heads --unit 0", "unit is 0"),
    ],
)
def test_wrong_options_are_errors_of_one_line(cost, line, message):
    with pytest.raises(ValueError, match=message) as error:
        cost(line)
    assert "\n" not in str(error.value)


def test_unreadable_configs_are_errors(cost, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"model_type": "abacus"}')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.json", "broken.json", "other.json", "bytes.json", ""):
        with pytest.raises(ValueError, match="no config can be read there") as error:
            cost(f"--config {tmp_path}/{name} --tokens 5")
        assert "\n" not in str(error.value)
    PhiConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--tokens .* is needed with --config"):
        cost(f"--config {tmp_path}")
