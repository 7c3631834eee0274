"""What many tests share, and the settings under which they run."""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny programs run once: compiling them is most of the suite's time. Half of that is LLVM's optimiser, and half of the
# rest the emitters of fused loops, which newer versions cannot do without, and threads for programs too small to split.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FAST_COMPILATION += " --xla_cpu_parallel_codegen_split_count=1"
if Version(version("jaxlib")) < Version("0.11"):
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION}"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from easydel.data.tree import PreferencePair
from easydel.infra.download import DownloadError, smollm2_135m_instruct
from easydel.modules.llama import LlamaForCausalLM
from easydel.weights.gguf.tokenizer import tokenizer_from_gguf
from tests.tiny import make_rows, make_tokenizer, random_pair, tiny_config

# No test touches the user's own cache; each has one of its own, so that none profits from what another one kept.
USERS_CACHE = os.environ.get("XDG_CACHE_HOME")
_session_cache = tempfile.TemporaryDirectory(prefix="easydel-tests-")
os.environ["XDG_CACHE_HOME"] = _session_cache.name


@pytest.fixture(autouse=True)
def cache_of_this_test(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory) -> None:
    """Every trainer compiles its steps anew; in a test session, over all its workers, most are the same program."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    jax.config.update("jax_compilation_cache_dir", str(shared / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    return LlamaForCausalLM.init(tiny_config(), jax.random.key(0))


@pytest.fixture(scope="session")
def pairs() -> list[PreferencePair]:
    rng = np.random.default_rng(0)
    return [random_pair(rng, index) for index in range(7)]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    return make_rows()


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M-Instruct and its tokenizer."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            # A download of 90 MB is worth keeping.
            if USERS_CACHE is None:
                patch.delenv("XDG_CACHE_HOME")
            else:
                patch.setenv("XDG_CACHE_HOME", USERS_CACHE)
            path = smollm2_135m_instruct()
        model = LlamaForCausalLM.from_pretrained(path, dtype=jnp.float32)
    except (DownloadError, ImportError) as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")
    # The golden numbers start from the weights as a bfloat16 folder holds them.
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), model)
    return model, tokenizer_from_gguf(path)
