"""Chat templates that ship with the product, written from the formats' public descriptions.

Place in the flow: `templates.resolve_template` looks names up here. A template is Jinja with `messages`, `tools`,
`add_generation_prompt`, `bos_token` and `eos_token`. `{{ BOS }}` stands for the beginning-of-sequence token where the
tokenizer itself would begin with one; it is resolved before compiling, so an exported template is plain Jinja.
No generation prompt ends in a space: the first token of an answer carries its own.
"""

from __future__ import annotations

# JSON tool calls between tags, as several open model families write them; lines of their own.
_TOOL_CALLS = """{%- for call in message.tool_calls or [] %}
    {{- '\\n' if message.content | trim or not loop.first }}
    {{- '<tool_call>\\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '\\n</tool_call>' }}
{%- endfor %}"""

_TOOL_LIST = """{%- if tools %}
    {{- '\\n\\n' if system else '' }}
    {{- 'You may call these functions:\\n<tools>\\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
    {{- '</tools>\\nWrite each call as <tool_call>{"name": ..., "arguments": {...}}</tool_call>.' }}
{%- endif %}"""

# The system message, wherever a format keeps it apart from the turns: `system` (text) and `turns` (the rest).
_SYSTEM_APART = """{%- set system = messages[0].content | trim if messages and messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if messages and messages[0].role == 'system' else messages %}
"""

CHATML = (
    "{{- BOS }}"
    + _SYSTEM_APART
    + """{%- if system or tools %}
    {{- '<|im_start|>system\\n' + system }}"""
    + _TOOL_LIST
    + """{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in turns %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim }}"""
    + _TOOL_CALLS
    + """{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
)

LLAMA2 = (
    _SYSTEM_APART
    + """{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' }}
        {%- if loop.first and system %}{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{%- endif %}
        {{- message.content | trim + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + ' ' + eos_token }}
    {%- else %}{{- raise_exception('Llama 2 knows no role ' + message.role) }}{%- endif %}
{%- endfor %}"""
)

LLAMA3 = (
    "{{- bos_token }}"
    + _SYSTEM_APART
    + """{%- if system or tools %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system }}"""
    + _TOOL_LIST
    + """{{- '<|eot_id|>' }}
{%- endif %}
{%- for message in turns %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + message.content | trim }}"""
    + _TOOL_CALLS
    + """{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
)

MISTRAL = (
    "{{- bos_token }}"
    + _SYSTEM_APART
    + """{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' }}
        {%- if loop.first and system %}{{- system + '\\n\\n' }}{%- endif %}
        {{- message.content | trim + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- else %}{{- raise_exception('this form of the Mistral template knows no role ' + message.role) }}{%- endif %}
{%- endfor %}"""
)

GEMMA = (
    "{{- bos_token }}"
    + _SYSTEM_APART
    + """{%- for message in turns %}
    {%- if message.role == 'tool' %}{{- raise_exception('Gemma knows no role tool') }}{%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {%- if loop.first and system %}{{- system + '\\n\\n' }}{%- endif %}
    {{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
)

PHI3 = """{{- BOS }}
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content | trim + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

PHI4 = """{{- BOS }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '<|im_sep|>' + message.content | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}"""

ALPACA = (
    "{{- BOS }}"
    + _SYSTEM_APART
    + """{{- system or 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' }}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- '\\n\\n### Instruction:\\n' + message.content | trim }}
    {%- elif message.role == 'assistant' %}
        {{- '\\n\\n### Response:\\n' + message.content | trim + eos_token }}
    {%- else %}{{- raise_exception('the Alpaca template knows no role ' + message.role) }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '\\n\\n### Response:\\n' }}{%- endif %}"""
)

VICUNA = (
    "{{- BOS }}"
    + _SYSTEM_APART
    + """{%- if system %}{{- system + ' ' }}{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- 'USER: ' + message.content | trim + ' ' }}
    {%- elif message.role == 'assistant' %}
        {{- 'ASSISTANT: ' + message.content | trim + eos_token }}
    {%- else %}{{- raise_exception('the Vicuna template knows no role ' + message.role) }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"""
)

PLAIN = (
    "{{- BOS }}"
    + _SYSTEM_APART
    + """{%- if system or tools %}
    {{- system }}"""
    + _TOOL_LIST
    + """{{- '\\n\\n' }}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {{- 'Assistant: ' + message.content | trim }}"""
    + _TOOL_CALLS
    + """{{- eos_token + '\\n' }}
    {%- else %}
        {{- message.role | capitalize + ': ' + message.content | trim + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"""
)

BUILT_IN: dict[str, str] = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi3": PHI3,
    "phi4": PHI4,
    "alpaca": ALPACA,
    "vicuna": VICUNA,
    "plain": PLAIN,
}
