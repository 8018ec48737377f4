"""Answers questions with exported models by transformers and peft alone: JSON in, JSON out.

A script for a process of its own (``test_export``); nothing of the platform may be imported.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

if __name__ == "__main__":
    order = json.load(sys.stdin)
    template = Path(order["template"]).read_text()
    answers: list[list[str]] = []
    for folder, adapter in order["models"]:
        processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter).eval()
        answers.append([])
        for question, image in order["questions"]:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=template
            )
            inputs = processor(
                images=Image.open(image), text=prompt, add_special_tokens=False, return_tensors="pt"
            )
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=50, do_sample=False)
            new = ids[0, inputs["input_ids"].shape[1] :]
            answers[-1].append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert not any(name.partition(".")[0] == "vgid" for name in sys.modules)
    json.dump(answers, sys.stdout)
