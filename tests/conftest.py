"""Every test runs on the modules of this checkout, offline and on the CPU; those of test_gpu.py on a GPU, if `make test-gpu` says so."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))
if os.environ.get("PLAINPPO_GPU_TESTS_ON") != "cuda":
    # The numbers in the tests are a CPU's, also on a machine with a GPU.
    os.environ["ACCELERATE_USE_CPU"], os.environ["CUDA_VISIBLE_DEVICES"] = "true", ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models are tiny: a second thread gains nothing, and waiting for it on a busy machine costs minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: starts DeepSpeed or a launcher for a README line, or takes minutes; make test-long")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; make test-gpu")
