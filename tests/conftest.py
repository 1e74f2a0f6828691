import logging
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch
from toy_corrector import save_toy_corrector, toy_models

from evenlight.pipeline import correct_photo

if not torch.cuda.is_available():  # Triton, imported later, interprets its kernels on the CPU
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # threads waiting for each other cost more than they give on toy sizes
hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")


@pytest.fixture
def folder():
    """In memory where there is one: a trial writes a hundred files with fsync."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture
def toys(monkeypatch):
    """Correctors find toy models, and nothing is left of those of another test."""
    monkeypatch.setattr("evenlight.pipeline.load.load_models", toy_models)
    correct_photo.predictor_of.cache_clear()
    yield
    correct_photo.predictor_of.cache_clear()
    logging.getLogger("evenlight").handlers = []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a corrector that was made with the toy models."""
    return save_toy_corrector(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window; a test that needs it is skipped where it is not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()
