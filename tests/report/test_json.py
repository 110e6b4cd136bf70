"""docs/json.md is the contract: the results have its keys, and what the verbs print validates."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from gpuksm.cli import main
from gpuksm.report import json as report_json
from gpuksm.scan import BenchResult, EstimateResult, EstimateTarget, ScanResult, Stage, TargetReport
from tests.report.samples import sample_scan

PAGE = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
SCHEMAS = {
    name: json.loads(text) for name, text in re.findall(r"```json schema=(\w+)\n(.*?)```", PAGE, re.DOTALL)
}
_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def differences(found: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """How `found` differs from `schema` (the part of JSON Schema that docs/json.md uses)."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    fits = any(
        isinstance(found, _TYPES[kind]) and (kind == "boolean") == isinstance(found, bool) for kind in kinds
    )
    if kinds and not fits:
        return [f"{where} is {found!r}, not {kinds}"]
    if "enum" in schema and found not in schema["enum"]:
        return [f"{where} is {found!r}, not one of {schema['enum']}"]
    problems = [f"{where}.{key} is missing" for key in schema.get("required", []) if key not in found]
    for key, inner in schema.get("properties", {}).items():
        if key in found:
            problems += differences(found[key], inner, f"{where}.{key}")
    for index, item in enumerate(found if "items" in schema else []):
        problems += differences(item, schema["items"], f"{where}[{index}]")
    return problems


def _names(kind: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    ("name", "result", "target"),
    [("scan", ScanResult, TargetReport), ("estimate", EstimateResult, EstimateTarget)],
)
def test_every_field_of_the_results_is_documented(name: str, result: type[Any], target: type[Any]) -> None:
    schema = SCHEMAS[name]
    inner = schema["properties"]["targets"]["items"]
    assert set(schema["required"]) == set(schema["properties"]) == _names(result)
    assert set(inner["required"]) == set(inner["properties"]) == _names(target)


def test_every_field_of_a_bench_is_documented() -> None:
    schema = SCHEMAS["bench"]
    inner = schema["properties"]["stages"]["items"]
    assert set(schema["required"]) == set(schema["properties"]) == _names(BenchResult)
    assert set(inner["required"]) == set(inner["properties"]) == _names(Stage)


def test_a_scan_result_validates() -> None:
    assert differences(report_json.as_object(sample_scan()), SCHEMAS["scan"]) == []


def test_the_validator_can_fail() -> None:
    found = report_json.as_object(sample_scan())
    del found["zero_pages"]
    found["seconds"] = "fast"
    found["targets"][0]["pid"] = True
    problems = differences(found, SCHEMAS["scan"])
    assert len(problems) == 3
    assert differences({"state": "bad"}, {"properties": {"state": {"enum": ["ok"]}}}) != []


@pytest.mark.parametrize("words", [["doctor", "--pid", str(os.getppid())], ["status"]])
def test_verbs_print_one_valid_object(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", str(tmp_path / "run"))
    assert main([*words, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert differences(json.loads(out), SCHEMAS[words[0]]) == []
