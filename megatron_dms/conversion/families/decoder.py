"""The dense decoder that all families here share: RMSNorm, grouped queries, RoPE, gated SiLU.

A family is described by what sets it apart (`Family`); config.json is read once into a `Model`, and every
key in it is either used, checked to be off, or listed as without effect on the computation. Anything else
is an error.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from megatron_dms.conversion import dms_formats
from megatron_dms.conversion.families import config_keys as keys
from megatron_dms.conversion.rope import RopeParameters, rope_parameters
from megatron_dms.conversion.transforms import (
    HF_LAYERS,
    MEGATRON_LAYERS,
    FusedQKV,
    Rename,
    Row,
    Stack,
    Vocabulary,
)
from megatron_dms.errors import CheckpointError
from megatron_dms.hf.configuration_dms import DMSSettings


@dataclass(frozen=True)
class Family:
    """What sets one family apart.

    qk_norm: q_norm and k_norm over the head size. default_head_size, default_groups: where config.json has no
    head_dim or no num_key_value_heads; None means hidden / heads, and as many as heads. qkv_bias: q, k and v
    have biases, the output projection has none (Megatron's --add-qkv-bias). off: further features that must
    not be in use, key -> the values that mean so; config.json must have these keys. sliding_window_alone:
    sliding_window is in use by itself; config.json must have the key.
    """

    model_type: str
    architectures: tuple[str, ...]
    qk_norm: bool
    default_head_size: int | None
    default_groups: int | None = None
    qkv_bias: bool = False
    off: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    sliding_window_alone: bool = False

    def read(
        self,
        config: Mapping[str, object],
        dms_metadata: Mapping[str, object] | None = None,
        accepted_keys: Collection[str] = (),
        told_head_size: int | None = None,
    ) -> "Model":
        """Check config.json key by key; raises CheckpointError. Arguments as of `read_model`."""
        found = config.get("architectures")  # some programs leave it out; model_type says enough then
        listed = isinstance(found, list) and len(found) == 1 and found[0] in self.architectures
        if found is not None and not listed:
            raise CheckpointError(
                f"config.json: architectures {found!r} is not supported for model_type {self.model_type}, "
                f"expected [{self.architectures[0]!r}]"
            )
        keys.check_known(config, self.off, accepted_keys)
        keys.check_off(config, self.off)
        # LLaMA 1 as first converted has the second name only
        length = "max_position_embeddings" if "max_position_embeddings" in config else "max_sequence_length"
        positions = keys.count(config, length if length in config else "max_position_embeddings")
        keys.check_sliding_window(config, self.sliding_window_alone, positions)
        hidden, heads = keys.count(config, "hidden_size"), keys.count(config, "num_attention_heads")
        told = "num_key_value_heads" in config  # null means as many as heads, absent the family's default
        groups = keys.count(
            config, "num_key_value_heads", default=heads if told else self.default_groups or heads
        )
        default_head_size = self.default_head_size or hidden // heads
        if "head_dim" in config:  # null: then the tensors tell
            default_head_size = told_head_size or default_head_size
        head_size = keys.count(config, "head_dim", default=default_head_size)
        if heads % groups:
            raise CheckpointError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
            )
        found_dms = dms_formats.read(config, dms_metadata)
        return Model(
            family=self,
            layers=keys.count(config, "num_hidden_layers"),
            hidden=hidden,
            ffn=keys.count(config, "intermediate_size"),
            heads=heads,
            groups=groups,
            head_size=head_size,
            vocab=keys.count(config, "vocab_size"),
            positions=positions,
            norm_epsilon=keys.norm_epsilon(config),
            # transformers' default, in all families
            tied=keys.flag(config, "tie_word_embeddings", default=False),
            rope=rope_parameters(config),
            dtype=keys.dtype(config),
            dms=found_dms.settings if found_dms else None,
        )

    def rows(self, model: "Model", predictor: str | None) -> list[Row]:
        """Return the name table, with the tensors of a predictor (None for a base model).

        Norms carry the names of Megatron's fused TE layers. Megatron's local spec maps to these names on
        saving and loading.
        """
        hidden, head = model.hidden, model.head_size
        q, kv = model.heads * head, model.groups * head
        att, hf_att = MEGATRON_LAYERS + "self_attention.", HF_LAYERS + "self_attn."
        mlp, hf_mlp = MEGATRON_LAYERS + "mlp.", HF_LAYERS + "mlp."
        qkv_names = tuple(f"{hf_att}{part}_proj." for part in "qkv")

        def norm(megatron: str, hf: str, size: int = hidden) -> Row:
            return Rename(megatron, (hf,), ((size,),))

        rows: list[Row] = [
            Vocabulary(
                "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ((model.vocab, hidden),)
            ),
            norm(att + "linear_qkv.layer_norm_weight", HF_LAYERS + "input_layernorm.weight"),
            FusedQKV(
                att + "linear_qkv.weight",
                tuple(name + "weight" for name in qkv_names),
                ((q, hidden), (kv, hidden), (kv, hidden)),
                model.groups,
            ),
        ]
        if self.qkv_bias:
            biases = tuple(name + "bias" for name in qkv_names)
            rows.append(FusedQKV(att + "linear_qkv.bias", biases, ((q,), (kv,), (kv,)), model.groups))
        if self.qk_norm:
            rows.append(norm(att + "q_layernorm.weight", hf_att + "q_norm.weight", head))
            rows.append(norm(att + "k_layernorm.weight", hf_att + "k_norm.weight", head))
        rows += [
            Rename(att + "linear_proj.weight", (hf_att + "o_proj.weight",), ((hidden, q),)),
            norm(mlp + "linear_fc1.layer_norm_weight", HF_LAYERS + "post_attention_layernorm.weight"),
            Stack(
                mlp + "linear_fc1.weight",
                (hf_mlp + "gate_proj.weight", hf_mlp + "up_proj.weight"),
                ((model.ffn, hidden), (model.ffn, hidden)),
            ),
            Rename(mlp + "linear_fc2.weight", (hf_mlp + "down_proj.weight",), ((hidden, model.ffn),)),
            norm("decoder.final_layernorm.weight", "model.norm.weight"),
        ]
        if not model.tied:
            rows.append(Vocabulary("output_layer.weight", ("lm_head.weight",), ((model.vocab, hidden),)))
        if predictor == "linear":
            rows += dms_formats.predictor_rows(hidden, model.groups, bias=self.qkv_bias)
        return rows

    def megatron_args(self, model: "Model") -> dict[str, object]:
        """Return names and values as in Megatron's `args`; `training_args.set_model_args` sets them there."""
        llama3 = model.rope["rope_type"] == "llama3"
        return {
            "num_layers": model.layers,
            "hidden_size": model.hidden,
            "ffn_hidden_size": model.ffn,
            "num_attention_heads": model.heads,
            "group_query_attention": model.groups != model.heads,
            "num_query_groups": model.groups,
            "kv_channels": model.head_size,
            "max_position_embeddings": model.positions,
            "position_embedding_type": "rope",
            "add_position_embedding": True,  # on for RoPE too; Megatron compares it on loading
            "use_rotary_position_embeddings": False,  # the deprecated spelling of position_embedding_type
            "rotary_base": model.rope["rope_theta"],
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "use_rope_scaling": llama3,
            "rope_scaling_factor": model.rope["factor"] if llama3 else 8.0,
            "rope_parameters": model.rope,
            "normalization": "RMSNorm",
            "layernorm_epsilon": model.norm_epsilon,
            "apply_layernorm_1p": False,
            "qk_layernorm": self.qk_norm,
            "swiglu": True,
            "squared_relu": False,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
            "untie_embeddings_and_output_weights": not model.tied,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "vocab_size": model.vocab,
            "tokenizer_type": "HuggingFaceTokenizer",
        }


@dataclass(frozen=True)
class Model:
    """A checked config.json.

    dtype: a name of torch's ("bfloat16"), None where the file gives none. dms: the settings of a DMS model,
    None for a base model.
    """

    family: Family
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_size: int
    vocab: int
    positions: int
    norm_epsilon: float
    tied: bool
    rope: RopeParameters
    dtype: str | None
    dms: DMSSettings | None

    def corrections(self, config: Mapping[str, object]) -> dict[str, object]:
        """Return what must change in the config.json that this model was read from, so that transformers can
        read the file too.
        """
        return keys.corrections(config, self.head_size, self.family.sliding_window_alone)

    def rows(self) -> list[Row]:
        """Return the name table of the model as its config.json describes it."""
        return self.family.rows(self, self.dms.predictor if self.dms else None)
