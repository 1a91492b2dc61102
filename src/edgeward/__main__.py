from edgeward.cli.main import main

raise SystemExit(main())
