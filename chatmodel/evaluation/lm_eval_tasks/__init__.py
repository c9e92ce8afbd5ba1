"""How does anybody's model take CORE and ChatCORE in lm_eval? The tasks as YAML files, with the classes behind them.

`lm_eval --include_path $(python -m chatmodel.evaluation.lm_eval_tasks) --tasks chatmodel_core,chatmodel_chatcore ...`
"""
