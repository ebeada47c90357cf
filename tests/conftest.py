"""One thread a test (many are faster apart than together) and no network, whatever a test asks."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """Public data that lies beside some checkouts; tests that need it skip where it does not."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"public test data is not present at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def published_reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model as others publish it: a small Llama, its own tokenizer and chat template."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    controls = ["<|begin|>", "<|start|>", "<|eot|>", "<|pad|>"]
    bytes_alone = Tokenizer(models.BPE())
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=controls,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bytes_alone.train_from_iterator(["twice that is what it is, and that is eight"] * 9, trainer)
    bytes_alone.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, bos_token=controls[0], eos_token=controls[2],
        pad_token=controls[3],
    )  # fmt: skip
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n"
        "{{ message['content'] | trim }}<|eot|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, num_labels=1,
        bos_token_id=0, eos_token_id=2, pad_token_id=3, initializer_range=0.4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("published_reward")
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
