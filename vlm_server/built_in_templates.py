"""The chat templates that `--chat-template NAME` knows: the words that each family of models was trained with.

Data only. Words that a tokenizer adds by itself, such as a first `<s>`, are not among them.
"""

from dataclasses import replace

from vlm_server.alpaca import TASK
from vlm_server.role_template import RoleTemplate

OWN = "hf"  # the name of the model's own template

_CHATML = RoleTemplate(
    system="<|im_start|>system\n",
    eosys="<|im_end|>\n",
    user="<|im_start|>user\n",
    eoh="<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    eoa="<|im_end|>",
    separator="\n",
    stop_words=("<|im_end|>",),
)
_VICUNA = RoleTemplate(
    meta_instruction=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    eosys=" ",
    user="USER: ",
    eoh=" ",
    assistant="ASSISTANT: ",
    generation_prompt="ASSISTANT:",
    eoa="</s>",
    stop_words=("</s>",),
)
_LLAMA2 = RoleTemplate(
    system="[INST] <<SYS>>\n",
    meta_instruction=(
        "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. Your answers should "
        "not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your responses are "
        "socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why "
        "instead of answering something not correct. If you don't know the answer to a question, please don't share false information."
    ),
    eosys="\n<</SYS>>\n\n",
    assistant=" [/INST] ",
    generation_prompt=" [/INST]",
    eoa=" </s>",
    separator="<s>[INST] ",
)
_MISTRAL = RoleTemplate(user="[INST] ", eoh=" [/INST]", eoa="</s>")
_DEEPSEEK_END = "<｜end▁of▁sentence｜>"
_INTERNLM_MAKERS = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory (上海人工智能实验室). "
    "It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as English and 中文."
)

BUILT_IN: dict[str, RoleTemplate] = {
    "alpaca": RoleTemplate(
        meta_instruction=TASK, eosys="\n\n", user="### Instruction:\n", eoh="\n\n", assistant="### Response: ", eoa="\n\n"
    ),
    "base": RoleTemplate(),
    "chatml": _CHATML,
    "codellama": replace(_LLAMA2, meta_instruction=""),
    "cogvlm": RoleTemplate(user="Question: ", eoh=" ", assistant="Answer:", eoa="</s>", separator="\n", stop_words=("</s>",)),
    "deepseek-vl": RoleTemplate(
        meta_instruction=(
            "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
            "and assist the user with a variety of tasks using natural language."
        ),
        eosys="\n\n",
        user="User: ",
        eoh="\n\n",
        assistant="Assistant: ",
        generation_prompt="Assistant:",
        eoa=_DEEPSEEK_END,
    ),
    "deepseek-vl2": RoleTemplate(
        user="<|User|>: ", eoh="\n\n", assistant="<|Assistant|>: ", generation_prompt="<|Assistant|>:", eoa=_DEEPSEEK_END
    ),
    "gemma": RoleTemplate(
        user="<start_of_turn>user\n",
        eoh="<end_of_turn>\n",
        assistant="<start_of_turn>model\n",
        eoa="<end_of_turn>\n",
        stop_words=("<end_of_turn>",),
    ),
    "internlm": RoleTemplate(
        system="<|System|>:",
        meta_instruction=_INTERNLM_MAKERS,
        eosys="\n",
        user="<|User|>:",
        eoh="\n",
        assistant="<|Bot|>:",
        eoa="<eoa>",
        separator="\n",
        stop_words=("<eoa>",),
    ),
    "internlm2": replace(_CHATML, meta_instruction=_INTERNLM_MAKERS, stop_words=("<|im_end|>", "<|action_end|>")),
    "internvl-zh": RoleTemplate(user="<human>: ", eoh=" ", assistant="<bot>: ", generation_prompt="<bot>:", eoa="</s>"),
    "llama2": _LLAMA2,
    "llama3": RoleTemplate(
        system="<|start_header_id|>system<|end_header_id|>\n\n",
        eosys="<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        eoh="<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        eoa="<|eot_id|>",
        stop_words=("<|eot_id|>", "<|end_of_text|>"),
    ),
    "llava-chatml": replace(
        _CHATML, meta_instruction="Answer the questions.", eosys="<|im_end|>", eoh="<|im_end|>", separator="", stop_words=("<|im_end|>",)
    ),
    "llava-v1": replace(
        _VICUNA,
        meta_instruction=(
            "A chat between a curious human and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the human's questions."
        ),
    ),
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL,
    "phi-3": RoleTemplate(
        system="<|system|>\n",
        eosys="<|end|>\n",
        user="<|user|>\n",
        eoh="<|end|>\n",
        assistant="<|assistant|>\n",
        eoa="<|end|>\n",
        stop_words=("<|end|>", "<|endoftext|>", "<|assistant|>"),
    ),
    "qwen": replace(_CHATML, meta_instruction="You are a helpful assistant."),
    "vicuna": _VICUNA,
}

# LMDeploy's other names, and why words cannot say what they mean.
NOT_BUILT_IN = {
    "chatglm": "it counts the rounds of the conversation",
    "deepseek-v32": "a program of the model's own writes its prompts",
    "deepseek-v4": "a program of the model's own writes its prompts",
}
