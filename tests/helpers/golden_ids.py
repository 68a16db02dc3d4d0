"""Token ids of idefics-9b-instruct, pinned by its released processor (transformers#28591)."""

ASSISTANT = [29871, 13, 7900, 22137, 29901]  # ▁ \n Ass istant :
A_DOG = [319, 11203, 29889, 32002]  # ▁A ▁dog . <end_of_utterance>
CHAT_IDS = [
    *(1, 4911, 29901),  # <s> ▁User :
    *(32000, 32001, 32000),  # <fake> <image> <fake>
    *(20355, 915, 445, 1967, 29889, 32002),  # ▁Desc ribe ▁this ▁image . <end_of_utterance>
    *ASSISTANT,
    *A_DOG,
    *(29871, 13, 2659, 29901),  # ▁ \n User :
    *(1724, 338, 372, 29973, 32002),  # ▁What ▁is ▁it ? <end_of_utterance>
    *ASSISTANT,
]  # fmt: skip
