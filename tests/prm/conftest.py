"""Fixtures for the tests of `prm`: a base, labels, and one trained reward model for all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM

from prm.model import quiet_transformers
from prm.train import train
from tests.prm.synthetic import (
    make_base,
    make_rows,
    make_tokenizer,
    small_config,
    write_label_folder,
)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model."""
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base that looks ahead."""
    config = BertConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,  # rows attend to each other as in a trained model
    )
    folder = tmp_path_factory.mktemp("encoder") / "model"
    with quiet_transformers():
        BertForMaskedLM(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of 40 tasks."""
    return write_label_folder(tmp_path_factory.mktemp("labels") / "labels", make_rows(40))


@pytest.fixture(scope="session")
def prm_folder(base: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that has learned the synthetic values."""
    out = tmp_path_factory.mktemp("prm") / "prm"
    train(small_config(base, labels, out, epochs=12, patience=0))
    return out


@pytest.fixture(scope="session")
def implicit_folder(base: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of the implicit head that has learned the synthetic values."""
    out = tmp_path_factory.mktemp("implicit") / "prm"
    train(small_config(base, labels, out, head="implicit", epochs=8, patience=0))
    return out


@pytest.fixture
def copied_prm(prm_folder: Path, tmp_path: Path) -> Callable[[], Path]:
    """A function that copies the trained reward model, to be spoilt."""

    def copy() -> Path:
        return Path(shutil.copytree(prm_folder, tmp_path / "prm"))

    return copy
