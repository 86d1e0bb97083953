def check_config(config): pass
