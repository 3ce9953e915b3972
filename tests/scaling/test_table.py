"""Which rows of a table one fit may use, and which tables are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mepa_ds.errors import UserError
from mepa_ds.scaling.table import choose_rows, inputs_of, read_table
from tests.scaling.runs import row, study


def test_tables_are_read_from_csv_and_parquet(tmp_path: Path) -> None:
    table = study()
    table.to_csv(tmp_path / "runs.csv", index=False)
    table.to_parquet(tmp_path / "runs.parquet")
    for name in ("runs.csv", "runs.parquet"):
        found = read_table(tmp_path / name)
        np.testing.assert_array_equal(found["loss"], table["loss"])
    for name, content, message in (
        ("none.csv", None, "no such file"),
        ("runs.txt", "x", r"a \.csv or \.parquet file"),
        ("damaged.parquet", "x", "cannot be read as parquet"),
        ("empty.csv", "", "cannot be read as csv"),
        ("head.csv", "loss,tokens\n", "no rows"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            read_table(tmp_path / name)


def test_rows_that_are_not_for_the_fit_are_named() -> None:
    table = study(seeds=2)
    more = [row(1e6, 5e7, status="failed", loss=np.nan), row(1e6, 6e7, status="running"), row(1e6, 7e7, role="lr")]
    chosen = choose_rows(pd.concat([table, pd.DataFrame(more)], ignore_index=True))
    assert len(chosen.rows) == 32
    assert chosen.left_out == {
        "status failed": ("n1e+06-d5e+07-s0",),
        "status running": ("n1e+06-d6e+07-s0",),
        "role hold_out": ("n1e+08-d1.4e+09-s0",),
        "role lr": ("n1e+06-d7e+07-s0",),
    }
    assert chosen.cluster == tuple(np.repeat(np.arange(16), 2).tolist())


def test_a_law_without_experts_takes_dense_runs_alone() -> None:
    """Where there are both kinds; the others are named. A law with experts takes all, as does a table of one kind."""
    moe = row(1e6, 5e7, kind="moe", experts=8, top_k=2)
    both = pd.concat([study(), pd.DataFrame([moe])], ignore_index=True)
    dense = choose_rows(both, law="chinchilla")
    assert set(dense.rows["kind"]) == {"dense"}
    assert dense.left_out["kind moe"] == (moe["run"],)
    assert set(choose_rows(both, law="joint-moe").rows["kind"]) == {"dense", "moe"}
    assert len(choose_rows(pd.DataFrame([moe]), law="chinchilla").rows) == 1


def changed(column: str, value: Any, place: int = 3) -> Callable[[], pd.DataFrame]:
    def make() -> pd.DataFrame:
        table = study()
        table[column] = [value if number == place else old for number, old in enumerate(table[column])]
        return table

    return make


BAD: dict[str, tuple[Callable[[], pd.DataFrame], str]] = {
    "tokenizers": (changed("tokenizer_hash", "other"), r"tokenizer_hash: 2 different values \(other, tok\)"),
    "held-out sets": (changed("heldout_hash", "other"), "heldout_hash: 2 different values"),
    "scales": (changed("scales", "1,2,4"), r"scales: 2 different values \(1,2,3, 1,2,4\)"),
    "best": (changed("weights_step", 7.0), "weights_step: the losses of .* are of step 7 of .* not of the last"),
    "cut short": (changed("samples", 5.0), "samples: .* saw 5 of .* the run was cut short"),
    "run twice": (changed("run", "n1e+06-d1.4e+07-s0"), "run: .* stand in the table more than once"),
    "same run": (
        lambda: pd.concat([study(), pd.DataFrame([row(1e6, 1.4e7, run="again")])]),
        "n1e.*again are the same run with the same seed",
    ),
    "nothing left": (
        lambda: study().assign(status="failed"), r"none of 17 rows can be used \(status failed: 17\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_rows_that_do_not_belong_together_are_refused(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(UserError, match=message):
        choose_rows(make())


def test_rows_left_out_may_be_of_another_kind() -> None:
    table = study()
    table.loc[16, "tokenizer_hash"] = "other"
    assert len(choose_rows(table).rows) == 16


def test_inputs_of_laws() -> None:
    rows = choose_rows(study()).rows
    found = inputs_of("chinchilla", rows, {"n": "params_total"})
    np.testing.assert_array_equal(found["N"], rows["params_total"])
    assert list(found) == ["N", "D", "loss"]
    np.testing.assert_array_equal(inputs_of("power", rows, {"x": "c"})["x"], rows["flops_model"])
    np.testing.assert_array_equal(inputs_of("power", rows, {"x": "width"})["x"], rows["width"])
    assert set(inputs_of("routed", rows, {})["E"]) == {1.0}, "a dense model has one expert"
    np.testing.assert_allclose(inputs_of("data", rows, {})["unique"], rows["tokens"])
    scales = inputs_of("var", rows, {})
    assert scales["loss_by_scale"].shape == (16, 3)
    assert scales["tokens_of_scale"].tolist() == [1, 4, 9]


def test_inputs_that_are_not_there() -> None:
    rows = choose_rows(study()).rows
    for law, table, columns, message in (
        ("chinchilla", rows.drop(columns="tokens"), {}, r"columns tokens are missing; there are run, role, .*name the"),
        ("chinchilla", rows.assign(loss="low"), {}, "loss: not a column of numbers .for one: 'low'"),
        ("chinchilla", rows, {"width": "width"}, "columns: width: unknown; give n, d, c, loss"),
        ("nothing", rows, {}, "no such law; choose one of power, chinchilla"),
        ("link", rows, {}, "columns fid are missing"),
        ("var", rows.drop(columns="loss_scale_3"), {}, "scales lists 3 sides, but there are 2 columns"),
    ):
        with pytest.raises(UserError, match=message):
            inputs_of(law, table, columns)


def test_foreign_tables_need_their_inputs_alone() -> None:
    table = pd.DataFrame({"size": [1e6, 1e7, 1e8, 2e8], "nats": [4.0, 3.5, 3.2, 3.2]})
    chosen = choose_rows(table, {"n": "size", "loss": "nats"})
    assert chosen.names == ("0", "1", "2", "3")
    assert chosen.cluster is None
    table.loc[3, "size"] = 1e8
    with pytest.raises(UserError, match="rows 2, 3 equal other rows in all columns; keep one of each"):
        choose_rows(table, {"n": "size", "loss": "nats"})
