"""Put a LoRA adapter into a model, through PEFT."""

from minivlm.model.options import ModelArgs


def add_lora(model, args: ModelArgs):
    """Return the model with a LoRA adapter (arXiv 2106.09685); it trains alone, or with the projector."""
    from peft import LoraConfig, get_peft_model  # an extra; imported where it is asked for

    decoder = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"
    tower = r"model\.vision_tower\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    target = {"decoder": decoder, "vision": tower, "all": f"{decoder}|{tower}"}[args.lora["targets"]]
    config = LoraConfig(
        r=int(args.lora["r"]),
        lora_alpha=int(args.lora["alpha"]),
        target_modules=target,
        modules_to_save=["multi_modal_projector"] if "projector" in args.train else None,
    )
    return get_peft_model(model, config)
