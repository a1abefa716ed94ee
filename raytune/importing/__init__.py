"""Configs of other trainers -> a config of raytune, with an account of each of their keys. Starts nothing, asks no hub.

`facts` says what the projects are like (`facts.yaml`), `draft` keeps the accounts, `arguments` converts what all of them have,
`axolotl`, `llama_factory` and `trl` what is their own, `imported` puts it together and `written` says it.
"""
