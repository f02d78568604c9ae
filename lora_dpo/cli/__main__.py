from lora_dpo.cli import main

main()
